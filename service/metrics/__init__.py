"""What the service counts: one registry an app, names that stay, labels from closed sets."""
