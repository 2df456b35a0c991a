"""Reports of requests, the log and the metrics."""
