"""What every stage stands on: settings, errors, files, the machine. No result depends on it."""
