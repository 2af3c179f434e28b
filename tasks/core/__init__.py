"""What every stage stands on: parameters, row schemas, errors, models and tracking."""
