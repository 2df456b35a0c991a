"""One prompt explained: the origin of its tokens, what reuse saved, and what it changed in the answer."""
