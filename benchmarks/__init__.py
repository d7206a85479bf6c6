"""One script per table or figure; results are committed under ``results/``."""
