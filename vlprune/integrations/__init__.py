"""vlprune inside programs that other people already run. Nothing here imports these programs until they ask."""
