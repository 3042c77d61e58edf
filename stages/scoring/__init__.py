"""From answers to scores, from scores to metrics, from metrics to intervals."""
