r"""A small transformer learns to write, character by character, with Muon: all in one file.

    python -m examples.minimal
    python -m examples.minimal --steps 1000 --width 192 --output loss.png

reads the source of Python's standard library, prints what each parameter is and the loss, draws
the loss, and writes some text of its own: half a minute on two CPU cores. On a mesh, which takes
the three lines below `if on_mesh`, all devices share the batch and the optimizer's work:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m examples.minimal --on-mesh
"""

import os
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from examples.moonlight.common.program import run_program
from muon_jax import by_use, muon


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm_1, self.norm_2 = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Model(nnx.Module):
    def __init__(self, width: int, length: int, rngs: nnx.Rngs):
        self.characters = nnx.Embed(128, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(2))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 128, rngs=rngs)

    def __call__(self, text):
        x = self.characters(text) + self.places(np.arange(text.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model, text):
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, text):
    loss, gradients = nnx.value_and_grad(loss_of)(model, text)
    optimizer.update(model, gradients)
    return loss


def main(steps=300, batch=32, length=64, width=96, on_mesh=False, output=Path("runs/minimal.png")):
    """Trains on Python's standard library, draws the loss into `output`, and writes some text."""
    devices = jax.device_count() if on_mesh else 1
    if min(steps, batch, length, width) < 1 or width % 4 or batch % devices:
        needs = f"--batch a multiple of {devices} (devices), --width one of 4 (heads)"
        raise ValueError(f"--steps, --batch, --length and --width must be positive, {needs}")
    if on_mesh:
        alone = ": nothing to share, see --help for a CPU with eight" if devices == 1 else ""
        print(f"devices: {devices}{alone}")
    output.parent.mkdir(parents=True, exist_ok=True)
    library = b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
    text = np.array([character for character in library if character < 128])  # ASCII
    starts = np.random.default_rng(0).integers(len(text) - length, size=(steps, batch, 1))
    batches = text[starts + np.arange(length + 1)]
    model, mesh = Model(width, length, nnx.Rngs(0)), None
    if on_mesh:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec())))
        batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.016, steps // 10, steps)
    roles = by_use(loss_of, model, batches[0])  # read from the loss: matrices, embeddings, head
    update = muon(rate, muon_weight_dimension_numbers=roles, mesh=mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), update)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    print(roles)
    losses = []
    for step in range(steps):
        losses.append(float(train_step(model, optimizer, batches[step])))
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step:3}: {losses[-1]:.3f} nats per character", flush=True)
    figure = Figure(layout="constrained")
    figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "nats per character"}).plot(losses)
    figure.savefig(output)
    print(f"drew the loss in {output}")
    predict, sample = nnx.jit(lambda model, text: model(text)[0, -1]), text[:length]
    for key in jax.random.split(jax.random.key(0), 400):
        logits = predict(model, sample[None, -length:]) / 0.7  # sharper than the model is sure
        sample = np.append(sample, jax.random.categorical(key, logits))
    print(bytes(sample.tolist()).decode())
    return losses


if __name__ == "__main__":
    run_program(lambda: tyro.cli(main, prog="python -m examples.minimal", description=__doc__))
