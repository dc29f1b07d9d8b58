"""The scaling-law study: how much of AdamW's compute does Muon need for the same loss?"""
