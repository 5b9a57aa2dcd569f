"""What a judge's reply means: a verdict, scores, a ranking, or `Unclear` with its reason. Nothing is guessed.

A reply is read the same way by all parsers:

- Full-width forms (`Ａ`, `：`) are ASCII: they are what a Chinese or Japanese keyboard writes for the same letter.
  No other look-alike is mapped; a Cyrillic А is not an A. Zero-width and bidirectional marks are dropped.
- Closed `<think>` blocks are dropped, and so is what the reply copies of the prompt in its `<text-1f3c9a2b>` marks
  (`judges.llm.templates.fence`). A block that never ended gives nothing.
- The last explicit statement (`Verdict: A`, `{"verdict": "A"}`, `<verdict>A</verdict>`) counts, since a judge may
  quote the format first, or argue with itself. It has to stand at the end, or in the first line with the reasons after
  it; anywhere else it may be a quotation. `[[A]]` and `[RESULT] A` count anywhere. A statement stands for itself: at the
  start of a line or sentence, outside quotes.
- Statements that say the same are one. Differing ones next to each other are one statement that says both, and so is
  `A or B`. An echo of the instructions (`Verdict: A|B|tie`) says nothing.
- Without an explicit statement, a sentence that is nothing but a verdict counts (`Completion B is better.`) if it is the
  reply's last or first, and a last line `**A**`. If such sentences differ, the last must draw a conclusion (`Therefore`).

A reply that its token limit cut off can end in a verdict by chance ("Verdict: A" of "Verdict: A and B are equal"). The
text does not show it: the caller abstains by the reply's finish reason.
"""
