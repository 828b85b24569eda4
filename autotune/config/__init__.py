"""Shape, recipe, plan, search settings: frozen dataclasses; TOML and nanoGPT files; the guide's rows."""
