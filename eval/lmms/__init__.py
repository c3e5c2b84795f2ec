"""vtok in lmms-eval."""
