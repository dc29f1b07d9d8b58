"""Each mutation is a patch of one place, with the tests that should fail on it."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A small break.

    Attributes:
      file: where, under `muon_jax`.
      old: what stands there, exactly once.
      new: what is put in its place.
      tests: pytest's arguments for the tests that should fail, the likeliest first.
    """

    file: str
    old: str
    new: str
    tests: str


ORTHOGONALIZE = "tests/optimizer/test_orthogonalize.py"
MUON = "tests/optimizer/test_muon.py"
STATE = "tests/optimizer/test_state.py"
LAWS = "tests/optimizer/test_laws.py"
MESH = "tests/mesh/test_distributed.py"
CLIP = "tests/qk_clip/test_qk_clip.py"

TEN_STEPS = f"{MESH} -k 'ten_steps and fsdp-'"
ONE_MATRIX = f"{MESH} -k 'same_bits_in_any_layout'"

MUTANTS: dict[str, Mutant] = {
    # --- Newton-Schulz
    "sign of b flipped": Mutant(
        "_newton_schulz.py",
        "return b * arithmetic.widen(gram) + c * sums",
        "return -b * arithmetic.widen(gram) + c * sums",
        f"{ORTHOGONALIZE} -k singular_basis",
    ),
    "no transposition back": Mutant(
        "_newton_schulz.py",
        "return _some_at_a_time(run, arithmetic, x.mT).mT",
        "return _some_at_a_time(run, arithmetic, x.mT).reshape(x.shape)",
        f"{ORTHOGONALIZE} -k 'transposition or exact_laws or singular_basis'",
    ),
    "tall matrices by the larger Gram matrix": Mutant(
        "_arithmetic.py",
        "return adjoint(x) if is_tall(x.shape) else x",
        "return x",
        "tests/optimizer/test_engines.py -k tall",
    ),
    "polynomial left unrounded": Mutant(
        "_newton_schulz.py",
        "return _apply(a, polynomial, x, arithmetic, rows)",
        "product = lambda p, y: jnp.matmul(p, arithmetic.widen(y).mT)\n"
        "    polynomial = b * arithmetic.widen(own) + c * arithmetic.product(own, gram)\n"
        "    return _apply(a, polynomial, x, arithmetic._replace(product=product), rows)",
        f"{ORTHOGONALIZE} -k polynomial_is_rounded",
    ),
    "Gram matrix left unrounded": Mutant(
        "_newton_schulz.py",
        "return rows.gather(arithmetic.symmetric(short, rows.own(short), lambda sums: sums))",
        "return rows.gather(arithmetic.product(rows.own(short), short))",
        f"{ORTHOGONALIZE} -k 'is_rounded'",
    ),
    "mirror image of another block": Mutant(
        "_symmetric.py",
        "transpose_in_tiles(panel[..., start:stop])",
        "transpose_in_tiles(panel[..., : stop - start])",
        "tests/optimizer/test_symmetric.py -k 'bits_are'",
    ),
    "scales that leave a Gram matrix unsymmetric": Mutant(
        "_preconditioning.py",
        "gram * larger * smaller",
        "gram * of_rows * of_cols",
        "tests/optimizer/test_symmetric.py -k 'aol'",
    ),
    "two steps at once with a multiple of I rounded": Mutant(
        "_newton_schulz.py",
        "return a + apart, arithmetic.store(rest - apart * jnp.broadcast_to(identity, rest.shape))",
        "return a, arithmetic.store(rest)",
        "tests/optimizer/test_engines.py -k no_worse",
    ),
    "places in the code of kernels": Mutant(
        "_common/pieces.py",
        "cpu=ones_at_arrays",
        "cpu=at_constants",
        "tests/optimizer/test_laws.py -k kernels_does",
    ),
    "steep steps taken two at once": Mutant(
        "_products.py",
        "steepness <= STEEPEST",
        "True",
        "tests/optimizer/test_engines.py -k no_worse",
    ),
    "narrow without its clip": Mutant(
        "_orthogonalize.py",
        "x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)",
        "pass",
        f"{ORTHOGONALIZE} -k largest_float32",
    ),
    "infinity hidden by the clip": Mutant(
        "_orthogonalize.py",
        "x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)",
        "x = jnp.clip(x, -limit, limit)",
        f"{ORTHOGONALIZE} -k 'largest_float32 or not_hidden'",
    ),
    "norm of the whole stack": Mutant(
        "_preconditioning.py",
        "norm = jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)))",
        "norm = jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(x)), axis=-1, keepdims=True)))",
        f"{ORTHOGONALIZE} -k singular_basis",
    ),
    "zero matrix without a guard": Mutant(
        "_preconditioning.py",
        "x = jnp.where(peak == 0, jnp.zeros((), x.dtype), x)",
        "pass",
        f"{STATE} -k derivative",
    ),
    "norm not of the largest first": Mutant(
        "_preconditioning.py",
        "x = (x * quarter) / _safe(peak * quarter)",
        "pass",
        f"{ORTHOGONALIZE} -k 'exact_laws or factor'",
    ),
    "adjoint without conjugation": Mutant(
        "_arithmetic.py",
        "return x.mT.conj() if jnp.iscomplexobj(x) else x.mT",
        "return x.mT",
        f"{ORTHOGONALIZE} -k complex_equals",
    ),
    "norm in the pieces' order": Mutant(
        "_newton_schulz.py", "x = lax.optimization_barrier(x)", "pass", ONE_MATRIX
    ),
    # --- Momentum
    "momentum not updated": Mutant(
        "_momentum.py",
        "momentum = beta * momentum.astype(wide) + gradient",
        "momentum = momentum.astype(wide) + 0 * gradient",
        f"{MUON} -k ten_steps",
    ),
    "momentum as an average": Mutant(
        "_momentum.py",
        "momentum = beta * momentum.astype(wide) + gradient",
        "momentum = beta * momentum.astype(wide) + (1 - beta) * gradient",
        f"{MUON} -k ten_steps",
    ),
    "Nesterov without the gradient": Mutant(
        "_momentum.py",
        "return momentum, beta * momentum + gradient if nesterov else momentum",
        "return momentum, momentum",
        f"{MUON} -k ten_steps",
    ),
    "Nesterov always": Mutant(
        "_momentum.py",
        "return momentum, beta * momentum + gradient if nesterov else momentum",
        "return momentum, beta * momentum + gradient",
        f"{MUON} -k ten_steps",
    ),
    "float16 moments": Mutant(
        "_momentum.py",
        "return jnp.dtype(jnp.float32 if param == jnp.float16 else param)",
        "return jnp.dtype(param)",
        f"{STATE} -k float16",
    ),
    "float16 gradients squared in float16": Mutant(
        "_adam_step.py",
        "gradients = [g.astype(jnp.float32) if g.dtype == jnp.float16 else g for g in gradients]",
        "pass",
        f"{STATE} -k float16",
    ),
    # --- Scale and decay
    "scale by the shorter side": Mutant(
        "_scaling.py",
        "return self.rms * math.sqrt(max(fan_in, fan_out))",
        "return self.rms * math.sqrt(min(fan_in, fan_out))",
        f"{MUON} -k 'rms or ten_steps'",
    ),
    "width transfer upside down": Mutant(
        "_scaling.py",
        "return math.sqrt(max(1.0, fan_out / fan_in))",
        "return math.sqrt(max(1.0, fan_in / fan_out))",
        f"{MUON} -k each_scale",
    ),
    "Update Norm of the real part": Mutant(
        "_update_rule.py",
        "jnp.square(jnp.abs(scaled))",
        "jnp.square(scaled.real)",
        f"{STATE} -k update_norm",
    ),
    "Update Norm over the stack": Mutant(
        "_update_rule.py",
        "rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(scaled)), axis=(-2, -1)))",
        "rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(scaled)))) * jnp.ones(len(wide))",
        f"{MUON} -k update_norm",
    ),
    "adaptive without 1 - beta": Mutant(
        "_update_rule.py",
        "factor = (1 - jnp.asarray(self.beta, dual.dtype)) * dual",
        "factor = dual",
        f"{MUON} -k adaptive",
    ),
    "decay before scaling": Mutant(
        "_muon.py",
        """                    step.on(decided.leaves_of("muon")),
                    optax.add_decayed_weights(weight_decay, decided.mask),
""",
        """                    optax.add_decayed_weights(weight_decay, decided.mask),
                    step.on(decided.leaves_of("muon")),
""",
        f"{MUON} -k 'ten_steps or zero_gradients'",
    ),
    "AdamW never decays": Mutant(
        "_muon.py",
        "optax.add_decayed_weights(adam_decay, decided.mask)",
        "optax.add_decayed_weights(0.0, decided.mask)",
        f"{MUON} -k 'ten_steps or zero_gradients'",
    ),
    "AdamW's betas exchanged": Mutant(
        "_muon.py",
        "(adam_b1, adam_b2, eps,",
        "(adam_b2, adam_b1, eps,",
        f"{MUON} -k ten_steps",
    ),
    "states of other parameters taken": Mutant(
        "_optimizer.py", "check_state_of(state, routes)", "pass", f"{STATE} -k state_of"
    ),
    # --- Batches and chunks
    "tall matrices not turned back": Mutant(
        "_newton_schulz.py",
        "return _some_at_a_time(run, arithmetic, x.mT).mT",
        "return _some_at_a_time(run, arithmetic, x.mT).reshape(x.shape)",
        f"{MUON} -k ten_steps",
    ),
    "chunks begin one too early": Mutant(
        "_common/loops.py",
        "first = start + number * length",
        "first = number * length",
        f"{LAWS} -k chunks_change",
    ),
    # --- The mesh
    "padding not zero": Mutant(
        "_mesh/owner_runners.py",
        "padded = jnp.pad(pieces, ((0, 1), *[(0, 0)] * (pieces.ndim - 1)))",
        "padded = jnp.concatenate([pieces, pieces[:1]])",
        f"{MESH} -k empty_slots",
    ),
    "idle devices work": Mutant(
        "_mesh/owner_runners.py",
        "return jnp.asarray(table)[axes_index(self.key.team)]",
        "return jnp.asarray(table)[::-1][axes_index(self.key.team)]",
        f"{MESH} -k empty_slots",
    ),
    "gather in the wrong order": Mutant(
        "_mesh/collectives.py", "for axis in reversed(axes):", "for axis in axes:", TEN_STEPS
    ),
    "rows of another sharer": Mutant(
        "_mesh/collectives.py",
        "start = lax.axis_index(self.axis) % self.ways * rows",
        "start = (lax.axis_index(self.axis) + 1) % self.ways * rows",
        f"{MESH} -k shared_matrices",
    ),
    "pieces joined out of order": Mutant(
        "_mesh/layout.py",
        "x = x.transpose(self._order(axes))",
        "x = x.transpose(self._order(axes[::-1]))",
        "tests/mesh/test_plan.py -k cutting",
    ),
    "chunks of the mesh all the first": Mutant(
        "_mesh/part_runner.py",
        "mine = jnp.asarray(kind_of[:, owners])[self._chunk, axes_index(self.key.team)]",
        "mine = jnp.asarray(kind_of[:, owners])[0, axes_index(self.key.team)]",
        f"{MESH} -k chunks",
    ),
    "mesh without scale": Mutant(
        "_mesh/distributed.py",
        "done = self.rule.finish(result, measured, (fan_in, fan_out))",
        "done = self.rule.finish(result, measured, (1, 1))",
        f"{MESH} -k ten_gaussian",
    ),
    "mesh without Nesterov": Mutant(
        "_mesh/distributed.py",
        "new, direction = heavy_ball(m, g, self.rule.beta, self.rule.nesterov)",
        "new, direction = heavy_ball(m, g, self.rule.beta, False)",
        f"{MESH} -k ten_gaussian",
    ),
    "mesh with another beta": Mutant(
        "_mesh/distributed.py",
        "new, direction = heavy_ball(m, g, self.rule.beta, self.rule.nesterov)",
        "new, direction = heavy_ball(m, g, 0.9, self.rule.nesterov)",
        f"{MESH} -k ten_gaussian",
    ),
}


def fits(mutant: Mutant, root: Path = ROOT) -> bool:
    """Whether the place that is to be broken stands exactly once where it should."""
    return (root / "muon_jax" / mutant.file).read_text().count(mutant.old) == 1
