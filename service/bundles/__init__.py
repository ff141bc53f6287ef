"""Which bundles are served, in which role, and how one takes another's place while requests go on."""
