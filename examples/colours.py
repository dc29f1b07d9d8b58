"""The colours of the project's pictures: one meaning each, whatever the page.

Line styles, markers and labels carry the meaning, and a colour repeats it: pictures are read in
print, too, and by people who see few colours.
"""

# Optimizers.
MUON, ADAMW, OPTAX_MUON, TORCH_MUON = "tab:blue", "tab:orange", "tab:purple", "tab:red"
OPTIMIZERS = {
    "muon": MUON,
    "muon_jax": MUON,
    "adamw": ADAMW,
    "optax": OPTAX_MUON,
    "torch": TORCH_MUON,
}

# Losses of a run: the mean of some steps, and held-out text.
TRAINING, VALIDATION = "#1b1b1b", "tab:green"

# Groups of a model's parameters.
ATTENTION, EXPERTS, DENSE, EMBEDDINGS = "tab:cyan", "tab:brown", "tab:olive", "0.3"

# Runs beside each other: one that something is wrong with, and one as it should be.
SICK, HEALTHY = "#aa3377", "0.55"

# What divides a matrix before Newton-Schulz.
PRECONDITIONINGS = {
    "frobenius": "#882255",
    "schatten": "#ccbb44",
    "aol": "#44aa99",
    "spectral": "#999999",
}

# What has no colour of its own: curves, and lines that mark a limit; and values behind their mean.
INK, FAINT = "#1b1b1b", "0.75"

# Fills behind words: axes of a matrix, a step of a decision, and its end in an error.
STEP, RAISES = "#eef4fb", "#fdeeee"
AXES = {"in": "#cfe3f7", "out": "#fde0c2", "batch": "#dcdcdc", "adam": "#f6f6f6", "asks": "#ffffff"}

# Fills of rooms within rooms, from the outermost.
ROOMS = ("#e3eef9", "#fdeedd", "#e8f3e4", "#f3e9f7")

# Ordered quantities, as layers and batch sizes, go through this map from dark to light, but for its
# last tenth, a yellow too light for paper.
ORDERED, LIGHTEST = "viridis", 0.9
