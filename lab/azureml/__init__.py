"""Azure ML: register models, submit jobs, see how they are."""
