"""The stages of the pipeline, each a script that dvc.yaml runs."""

import gc

# Importing torch and transformers makes a million objects, which the garbage collector, as Python sets it, looks
# through hundreds of times: up to a fifth of the time that a stage takes to start.
gc.set_threshold(50_000)
