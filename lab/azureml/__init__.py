"""Azure ML: submit jobs, see how they are, bring their results back."""
