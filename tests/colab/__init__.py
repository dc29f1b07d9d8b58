"""The notebooks: as they are in git, their installation, and their cells from top to bottom."""
