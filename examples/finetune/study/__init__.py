"""The study of fine-tuning: which optimizer for a model that was pre-trained with which?"""
