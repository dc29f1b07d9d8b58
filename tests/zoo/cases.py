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
]
