"""Language models as judges, served by an OpenAI-compatible endpoint."""
