"""What was once read wrongly without a word: small trees, their verdicts, and the wrong ones.

Each case is the lines of a zoo entry and, for its first leaf, a verdict that must be rejected.
"""

CASES = [
    # Layers and experts folded into one matrix, for their names were attention's.
    ("ffn/wo 8x2048x512 asks muon 1>2\nffn/wi_0 8x512x2048 asks muon 1>2", "muon 0,1>2"),
    (
        "mlp/wo/kernel 2048x12x512 asks muon 0>2\nmlp/wi/kernel 512x12x2048 asks muon 0>2",
        "muon 0,1>2",
    ),
    ("wq 12x512x512 asks muon 1>2\nw1 12x512x2048 asks muon 1>2", "muon 0>1,2"),
    ("wo 12x512x512 asks muon 1>2\nw1 12x512x2048 asks muon 1>2", "muon 0,1>2"),
    ("b1 12x2048 adam\nw1 12x512x2048 asks muon 1>2", "muon 0>1"),
    ("shift 12x2048 adam\nw1 12x512x2048 asks muon 1>2", "muon 0>1"),
    (
        "attn/q/kernel 12x512x512 asks muon 1>2\nattn/k/kernel 12x512x512 asks muon 1>2\n"
        "attn/v/kernel 12x512x512 asks muon 1>2\nattn/o/kernel 12x512x512 asks muon 1>2",
        "muon 0>1,2",
    ),
    (
        "attention/query/kernel 512x12x512 asks muon 0>2\n"
        "attention/out/kernel 512x12x512 asks muon 0>2",
        "muon 0>1,2",
    ),
    (
        "layers/wq 512x12x512 asks muon 0>2\nlayers/wk 512x12x512 asks muon 0>2\n"
        "layers/wi 512x12x2048 asks muon 0>2\nlayers/ln 512x12 adam",
        "muon 1>2",
    ),
    # A window of three rows and three layers of a window of three look alike, but for the gains.
    (
        "tower/conv/kernel 3x3x512x512 asks muon 1,2>3\ntower/norm/scale 3x512 adam",
        "muon 0,1,2>3",
    ),
    # Heads exchanged, missed, or seen where none is.
    ("classifier/dense/kernel 768x768 muon 0>1\nclassifier/out_proj/kernel 768x2 adam", "adam"),
    ("classifier/out_proj/kernel 768x2 adam\nclassifier/dense/kernel 768x768 muon 0>1", "muon 0>1"),
    ("logitdense/kernel 512x32000 adam", "muon 0>1"),
    ("fc/kernel 2048x1000 adam\nlayer1/kernel 512x512 muon 0>1", "muon 0>1"),
    ("output/kernel 512x32000 adam\nlayer1/kernel 512x512 muon 0>1", "muon 0>1"),
    (
        "classifier/layers/2/kernel 512x10 adam\nclassifier/layers/0/kernel 512x512 muon 0>1",
        "muon 0>1",
    ),
    ("classifier/layers/0/kernel 512x512 muon 0>1\nclassifier/layers/2/kernel 512x10 adam", "adam"),
    ("lm_head/layers/0/kernel 512x32000 adam", "muon 0>1"),
    ("classifier/0/kernel 512x512 muon 0>1\nclassifier/2/kernel 512x10 adam", "adam"),
    ("heads/0/weight 512x100 adam\nheads/1/weight 512x100 adam", "muon 0>1"),
    ("router_logits/kernel 512x8 muon 0>1", "adam"),
    ("gate_logits/kernel 512x8 muon 0>1", "adam"),
    ("pre_logits/kernel 768x768 muon 0>1", "adam"),
    ("multi_head/kernel 512x512 muon 0>1", "adam"),
    ("attn_head/kernel 512x512 muon 0>1", "adam"),
    ("to_words/kernel 512x32000 adam\nembed/embedding 32000x512 adam", "muon 0>1"),
    ("back/weight 32000x512 adam\nembed/embedding 32000x512 adam", "muon 0>1"),
    (
        "Dense_1/kernel 256x10 adam\nConv_0/kernel 3x3x1x32 adam\nDense_0/kernel 3136x256 muon 0>1",
        "muon 0>1",
    ),
    # Tables of rows.
    ("mixer/A_log 5120x16 adam", "muon 0>1"),
    ("attention/time_decay 32x64 adam", "muon 0>1"),
    ("attention/time_faaaa 32x64 adam", "muon 0>1"),
    ("attention/time_decay_w1 2048x64 muon 0>1", "adam"),
    ("attn/rel_pos_h 27x64 adam", "muon 0>1"),
    ("codebook 1024x128 adam", "muon 0>1"),
    ("latents 256x1024 adam", "muon 0>1"),
    ("queries 100x256 adam", "muon 0>1"),
    ("soft_prompt 20x768 adam", "muon 0>1"),
    ("register_tokens 4x768 adam", "muon 0>1"),
    ("mask_tokens 10x1x1x32 adam", "muon 0>3"),
    ("token_table/table 32000x512 adam", "muon 0>1"),
    ("vocab/weight 32000x512 adam", "muon 0>1"),
    ("tok/w 32000x512 adam", "muon 0>1"),
    ("mixer/conv_kernel 4x512 adam", "muon 0>1"),
    # Linear layers called embeddings or norms.
    ("posterior_encoder/kernel 512x512 muon 0>1", "adam"),
    ("post_encoder/kernel 512x512 muon 0>1", "adam"),
    ("compose_encoder/kernel 512x512 muon 0>1", "adam"),
    ("norm_mlp/kernel 512x2048 muon 0>1", "adam"),
    ("ln_mlp/kernel 512x2048 muon 0>1", "adam"),
    ("embed_proj/kernel 128x512 muon 0>1", "adam"),
    ("embedding_mlp/kernel 128x512 muon 0>1", "adam"),
    ("encoder/embedding_hidden_mapping_in/kernel 128x4096 muon 0>1", "adam"),
    ("electra/embeddings_project/kernel 128x256 muon 0>1", "adam"),
    # Convolutions, whatever their module is called.
    ("features/3/kernel 3x3x128x32 muon 0,1,2>3", "muon 2>3"),
    ("downsamplers/0/kernel 3x3x128x128 muon 0,1,2>3", "muon 2>3"),
    ("conv_shortcut/kernel 1x1x128x256 muon 0,1,2>3", "muon 2>3"),
    ("patch_embeddings/projection/kernel 16x16x3x768 muon 0,1,2>3", "muon 2>3"),
    ("patch_embed/kernel 16x16x3x768 muon 0,1,2>3", "adam"),
    ("patch_embed/kernel 2x16x16x3x768 muon 0,1,2,3>4", "muon 3>4"),
    ("conv_init/kernel 7x7x3x64 muon 0,1,2>3", "muon 2>3"),
    ("stem/kernel 16x16x3x768 muon 0,1,2>3", "muon 2>3"),
    ("encoder/conv1_d/w 3x80x512 muon 0,1>2", "muon 1>2"),
    ("conv/weight 64x32x3x3 asks muon 1,2,3>0", "muon 2>3"),
    ("conv/weight 64x32x3 asks muon 1,2>0", "muon 1>2"),
    # Heads whose biases have the axes of a kernel's are no stack.
    (
        "attn/query/kernel 4x2x2 muon 0>1,2\nattn/query/bias 2x2 adam\n"
        "attn/out/kernel 2x2x4 muon 0,1>2\nattn/out/bias 4 adam",
        "adam",
    ),
    # As wide as the embedding has rows, in every block.
    (
        "block_{0..3}/mlp/up/kernel 256x1024 muon 0>1\n"
        "block_{0..3}/mlp/down/kernel 1024x256 muon 0>1\nembed/embedding 1024x256 adam",
        "adam",
    ),
    ("blocks/mlp/up/kernel 12x256x1024 muon 1>2\nembed/embedding 1024x256 adam", "adam"),
    (
        "mlp/fc1/kernel 192x768 muon 0>1\nmlp/fc2/kernel 768x192 muon 0>1\n"
        "patch_embed/kernel 768x192 muon 0>1",
        "adam",
    ),
    ("predictor_proj/kernel 384x1024 muon 0>1\npatch_embed/kernel 1024x384 muon 0>1", "adam"),
    # One output bias for all experts.
    (
        "ffn/wo 8x2048x512 asks muon 1>2\nffn/wi 8x512x2048 asks muon 1>2\nffn/bo 512 adam",
        "muon 0,1>2",
    ),
    (
        "ffn/wo 8x2048x512 asks muon 1>2\nffn/wi 8x512x2048 asks muon 1>2\nffn/wo_bias 512 adam",
        "muon 0,1>2",
    ),
    ("w_out/kernel 8x2048x512 asks muon 1>2\nw_out/bias 512 adam", "muon 0,1>2"),
    # Stacks of a square, or of one row, are no windows.
    ("attn/qkv/kernel 3x3x192x64 asks muon 2>3", "muon 0,1,2>3"),
    ("attn/kv/kernel 2x1x512x64 asks muon 2>3", "muon 0,1,2>3"),
    ("kv_proj/kernel 2x2x512x64 asks muon 2>3", "muon 0,1,2>3"),
    ("gat/W/kernel 8x1x512x64 asks muon 2>3", "muon 0,1,2>3"),
    ("ffn/expand/kernel 8x1x768x3072 asks muon 2>3", "muon 0,1,2>3"),
    (
        "stages/mlp/c_fc/kernel 4x4x512x2048 asks muon 2>3\nstages/norm/scale 4x4x512 adam",
        "muon 0,1,2>3",
    ),
    (
        "tower/mixer/kernel 4x4x512x2048 asks muon 2>3\ntower/norm/scale 4x4x512 adam",
        "muon 0,1,2>3",
    ),
    ("pp/mlp/c_fc/kernel 4x4x512x2048 asks muon 2>3", "muon 0,1,2>3"),
    ("ScanBlock_0/moe/c_fc/kernel 8x8x768x3072 asks muon 2>3", "muon 0,1,2>3"),
    ("ConvLocal_0/kernel 26x26x27x32 asks muon 2>3", "muon 0,1,2>3"),
    # Windows that all convolutions of a module have are no stack.
    (
        "blocks/conv_0/kernel 3x80x512 muon 0,1>2\nblocks/conv_1/kernel 3x512x512 muon 0,1>2",
        "muon 1>2",
    ),
    (
        "conv_blocks/conv_a/kernel 3x1x64x64 muon 0,1,2>3\n"
        "conv_blocks/conv_b/kernel 3x3x64x128 muon 0,1,2>3",
        "muon 1,2>3",
    ),
    ("conv_proj/kernel 12x512x2048 asks muon 1>2", "muon 0,1>2"),
    ("conv_proj/kernel 12x512x2048 muon 0,1>2\nconv_proj/bias 2048 adam", "muon 1>2"),
    ("attn_experts/{q,k} 512x8x64 asks muon 0>1,2", "muon 1>2"),
    ("ffn/experts/kernel 512x8x2048 asks muon 1>2", "muon 0>1,2"),
    ("moe/phi 768x128x2 asks muon 1>2", "muon 0>1,2"),
    ("net/wq 16x16x32 asks muon 1>2\nnet/wo 16x32x16 asks muon 1>2", "muon 0>1,2"),
    # The last layer behind convolutions, where it is the model's head.
    (
        "Dense_0/kernel 3136x512 muon 0>1\nConv_{0..1}/kernel 3x3x64x64 muon 0,1,2>3\n"
        "logits/kernel 512x6 adam\nvalue/kernel 512x1 adam",
        "adam",
    ),
    (
        "linear/kernel 768x768 muon 0>1\nstem/kernel 16x16x3x768 muon 0,1,2>3\n"
        "head/kernel 768x10 adam",
        "adam",
    ),
    (
        "Dense_1/kernel 512x512 muon 0>1\nDense_0/kernel 3136x512 muon 0>1\n"
        "Conv_0/kernel 3x3x3x64 muon 0,1,2>3\nhead/kernel 512x10 adam",
        "adam",
    ),
    (
        "Dense_1/kernel 256x512 muon 0>1\nDense_0/kernel 64x256 muon 0>1\n"
        "Conv_0/kernel 3x3x3x64 muon 0,1,2>3\nDown_0/Dense_0/kernel 512x128 muon 0>1",
        "adam",
    ),
    (
        "linear/kernel 64x1024 muon 0>1\nConv_0/kernel 3x3x64x3 muon 0,1,2>3\n"
        "ConvTranspose_0/kernel 3x3x64x64 muon 0,1,2>3",
        "adam",
    ),
    ("fc/kernel 3136x512 muon 0>1\nout/kernel 512x6 adam", "adam"),
    ("out/kernel 256x10 adam\nfc/kernel 784x256 muon 0>1", "muon 0>1"),
    # Layers of a head, numbered in their names.
    ("classifier/Dense_0/kernel 512x256 muon 0>1\nclassifier/Dense_1/kernel 256x10 adam", "adam"),
    ("cls_head/fc1/kernel 512x256 muon 0>1\ncls_head/fc2/kernel 256x10 adam", "adam"),
    ("predictor/Dense_0/kernel 512x256 muon 0>1\npredictor/Dense_1/kernel 256x64 adam", "adam"),
    (
        "bbox_head/fc6/kernel 12544x1024 muon 0>1\nbbox_head/fc7/kernel 1024x1024 muon 0>1\n"
        "bbox_head/fc_cls/kernel 1024x81 adam\nbbox_head/fc_reg/kernel 1024x320 adam",
        "adam",
    ),
    (
        "classifier/layers_2/kernel 256x10 adam\nclassifier/layers_0/kernel 512x256 muon 0>1",
        "muon 0>1",
    ),
    (
        "head/layers/4/kernel 2048x256 muon 0>1\nhead/layers/0/kernel 768x2048 muon 0>1\n"
        "head/layers/2/kernel 2048x2048 muon 0>1\nhead/last_layer/kernel 256x65536 adam",
        "adam",
    ),
    ("head/last_layer/kernel 256x65536 adam\nhead/layers/0/kernel 768x256 muon 0>1", "muon 0>1"),
    # A kernel called an embedding is a linear map.
    ("patch_embed/kernel 768x192 muon 0>1", "adam"),
    ("decoder_embed/kernel 1024x512 muon 0>1", "adam"),
    ("context_embedder/kernel 1024x512 muon 0>1", "adam"),
    ("time_embed/kernel 256x512 muon 0>1", "adam"),
    ("embedding/0/kernel 256x512 muon 0>1", "adam"),
    ("tok/kernel 256x512 muon 0>1", "adam"),
    # Projections to rows.
    ("attn/queries/w 512x512 muon 0>1", "adam"),
    ("to_latents/w 512x256 muon 0>1", "adam"),
    ("attn/w_queries 512x512 muon 0>1", "adam"),
    ("attn/w_tokens 512x512 muon 0>1", "adam"),
    ("prompt/w 512x512 muon 0>1", "adam"),
    ("attn/kv_latent/w 4096x512 muon 0>1", "adam"),
    ("attn/w_q_latent 512x512 muon 0>1", "adam"),
    # What attention and routers call heads and logits.
    ("moe/router/logits/kernel 512x8 muon 0>1", "adam"),
    ("gate/logit_proj/kernel 512x8 muon 0>1", "adam"),
    ("attn/out_head/kernel 512x512 muon 0>1", "adam"),
    ("attn/heads/0/proj/kernel 512x64 muon 0>1", "adam"),
    ("MultiHeadAttention_0/Heads_0/Dense_0/kernel 512x64 muon 0>1", "adam"),
    ("talking_heads/kernel 12x12 muon 0>1", "adam"),
    ("attn/score/kernel 512x64 muon 0>1", "adam"),
    ("post_logits/kernel 512x512 muon 0>1", "adam"),
    ("logit_mlp/kernel 512x512 muon 0>1", "adam"),
    ("dyn/obslogit/kernel 512x1024 muon 0>1", "adam"),
    ("output_projection/kernel 768x1000 adam", "muon 0>1"),
    ("predictions/kernel 768x1000 adam", "muon 0>1"),
    ("q_head/kernel 512x18 adam", "muon 0>1"),
    ("policy_head/~/linear/w 512x18 adam", "muon 0>1"),
    ("heads/policy/kernel 512x18 adam", "muon 0>1"),
    # Narrow linear maps around convolutions.
    ("conv_out/kernel 16x3 muon 0>1", "adam"),
    ("pointwise_conv/kernel 8x64 muon 0>1", "adam"),
    ("conv_gate/kernel 8x512 muon 0>1", "adam"),
    ("mixer/conv1d/w 4x512 adam", "muon 0>1"),
    # Biases called b.
    (
        "attn/query/b 16x128 adam\nattn/query/w 2048x16x128 muon 0>1,2",
        "muon 0>1",
    ),
    ("scan/linear/b 12x2048 adam\nscan/linear/w 12x512x2048 asks muon 1>2", "muon 0>1"),
    ("attn/b_q 8x64 adam\nattn/w_q 512x512 muon 0>1", "muon 0>1"),
    ("lora/b 8x512 muon 0>1\nlora/a 512x8 muon 0>1\nlora/w 512x512 muon 0>1", "adam"),
    # Tables by name.
    ("prototypes 3000x256 adam", "muon 0>1"),
    ("attn/slots 7x64 adam", "muon 0>1"),
    ("attn/null_k 8x64 adam", "muon 0>1"),
    ("W_pos 1024x768 adam", "muon 0>1"),
    # What is proposed, where it is asked for.
    ("{down,up,out,in,to_out,mlp,w1}/kernel 3x3x128x128 asks muon 0,1,2>3", "muon 2>3"),
    ("attn_1/q/kernel 1x1x512x512 asks muon 0,1,2>3", "muon 0>3"),
    ("attn/attn_out_proj/kernel 8x64x512 asks muon 0,1>2", "muon 1>2"),
    ("attn/post/w 2048x16x128 asks muon 1,2>0", "muon 1>2"),
    ("attn/combined_qkv/w 3x2048x16x128 asks muon 1>2,3", "muon 2>3"),
    ("query/dense/kernel 512x8x64 asks muon 0>1,2", "muon 1>2"),
    ("attn/oproj/kernel 8x64x512 asks muon 0,1>2", "muon 1>2"),
    ("attn/c_proj/kernel 8x64x512 asks muon 0,1>2", "muon 1>2"),
    ("attn/out_linear/kernel 8x64x512 asks muon 0,1>2", "muon 1>2"),
    ("attn/k_b 512x128x128 asks muon 0>1,2\nattn/v_b 512x128x128 asks muon 0>1,2", "muon 1>2"),
    ("mixer/q_proj/kernel 512x4x4 asks muon 1>2", "muon 0>1,2"),
    ("res/kernel 1x128x128 asks muon 0,1>2", "muon 1>0"),
    ("dilated/kernel 2x128x256 asks muon 0,1>2", "muon 1>2"),
    ("ssm/B 64x128x2 asks adam", "muon 1>2"),
    ("attn/queries/weight 512x512 muon 0>1", "adam"),
    ("softmax/emb_var 50304x2048 adam", "muon 0>1"),
    ("block/scale_shift_table 6x512 adam", "muon 0>1"),
    (
        "Dense_1/kernel 256x512 muon 0>1\nDense_0/kernel 64x256 muon 0>1\n"
        "Conv_0/kernel 3x3x3x64 muon 0,1,2>3\nConv_1/kernel 3x3x64x3 muon 0,1,2>3",
        "adam",
    ),
    ("gat/W/kernel 8x1x512x64 asks muon 2>3\ngat/V/kernel 8x1x512x64 asks muon 2>3", "adam"),
    (
        "attn/qproj/kernel 512x8x64 muon 0>1,2\nattn/attention_output/kernel 8x64x512 muon 0,1>2",
        "muon 1>2",
    ),
    # A stack that is not believed is a doubt for what reads as a window below it.
    (
        "stages/mixer/kernel 4x4x512x2048 asks muon 2>3\n"
        "stages/other/kernel 4x4x2048x512 asks muon 2>3",
        "muon 0,1,2>3",
    ),
    ("block_0/up/kernel 256x1024 muon 0>1\nembed/embedding 1024x256 adam", "adam"),
    (
        "mlp/up/kernel 256x1024 muon 0>1\nmlp/wider/kernel 1024x300 muon 0>1\n"
        "embed/embedding 1024x256 adam",
        "adam",
    ),
    (
        "to_words/kernel 512x32000 adam\n{encoder,decoder}/embed/embedding 32000x512 adam",
        "muon 0>1",
    ),
]
