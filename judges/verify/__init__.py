"""Judges that check by rule: answers, schemas, instructions, mathematics, programs."""
