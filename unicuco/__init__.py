"""UniCuCo: learn once how a language model compresses, then answer any compression request."""
