"""The offline tasks: pictures and questions made by the suite, with no network."""
