"""Everything that touches SGLang: the only part of the package that imports it."""
