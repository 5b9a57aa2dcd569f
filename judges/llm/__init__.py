"""Language models as judges, behind an OpenAI-compatible endpoint."""
