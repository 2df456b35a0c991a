"""One prompt explained: where its tokens came from, what that saved, and what it changed."""
