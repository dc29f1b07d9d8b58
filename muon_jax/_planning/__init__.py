"""``python -m muon_jax report``: what Muon would do with a model, from its shapes alone.

    tensors             what a model's parameters are: names, shapes, dtypes; what is left out
    hugging_face        read from the headers of a directory's safetensors files
    orbax               read from an Orbax checkpoint's metadata
    words               the words of the command line: meshes, specs, axes
    shardings           where parameters lie that no word was said about
    model_report        routing, plan, bytes and FLOPs as one value, as text and as JSON
    command             the command line

No weight is read, no array is made, and no device is asked for: the mesh is abstract.
"""
