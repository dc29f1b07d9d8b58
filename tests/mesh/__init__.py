"""Matrices shared out over devices: the plan, the step that runs it, and the bits it promises."""
