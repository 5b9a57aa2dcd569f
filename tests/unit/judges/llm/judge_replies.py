"""Replies of judges as public benchmarks ask for them, drawn from templates with a seed: no model wrote them.

`replies(kind, count, seed=…)` yields `(reply, verdict)`, where the verdict is "first", "second" or "tie", or None if the
reply says none: it contradicts itself, quotes another's verdict, lists the choices, or does not decide.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Verdict = str | None
Sides = tuple[str, str, str]
"""The winner's letter, the loser's, and what completions are called in the reply."""

TASKS = [
    "a Python function that merges two sorted lists",
    "a haiku about late autumn",
    "the year in which the Berlin Wall fell",
    "a polite e-mail that declines an invitation",
    "the sum of the first 50 odd numbers",
    "a summary of the article in two sentences",
    "advice on how to store fresh basil",
    "the integral of x·e^x",
    "a SQL query for the three best customers",
    "a translation of the sentence into French",
]
OWN_ANSWERS = [
    "```python\ndef merge(a, b):\n    # A is never longer than B here\n    out = []\n    while a and b:\n"
    "        out.append(a.pop(0) if a[0] < b[0] else b.pop(0))\n    return out + a + b\n```",
    "The sum of the first n odd numbers is n². For n = 50 it is 2,500.",
    "Let A = [[1, 2], [3, 4]] and B = [[0, 1], [1, 0]]. Then AB = [[2, 1], [4, 3]].",
    "1. Rinse the leaves.\n2. Dry them.\n3. Put the stems in water, as with flowers.",
    "Leaves let go at last\nA cold wind counts them slowly\nThe gate stays open",
    '```json\n{"customers": [{"name": "Ada", "total": 120.5}], "result": "ok"}\n```',
    "The derivative is found by parts:\n\n$$\\int x e^x dx = (x-1)e^x + C$$\n\n**Final answer:** $(x-1)e^x + C$",
    "| Option | Price |\n| --- | --- |\n| A | 10 |\n| B | 12 |\n\nOption A is the cheaper one for small teams.",
    "Dear Ms Okafor,\n\nThank you for asking me. I cannot come on Friday, but I wish you a good evening.\n\nBest,\nJ.",
    "SELECT customer, SUM(total) AS t FROM orders GROUP BY customer ORDER BY t DESC LIMIT 3;",
]
PRAISE = [
    "{n} {w} addresses every part of the request, in an order that is easy to follow.",
    "{n} {w} is correct: I checked its numbers and they hold.",
    "In terms of clarity, {n} {w} is better.",
    "{n} {w} explains why each step is needed, which helps a beginner.",
    "The tone of {n} {w} fits what was asked; it isn't too formal.",
    "{n} {w} handles the empty list. A reader would notice this at once.",
    "{n} {w} keeps to the format that the user wanted (two sentences, no list).",
    "On accuracy, {n} {w} does well, and its example runs as written.",
    "What I like about {n} {w} is its concision: no word is wasted.",
    "{n} {w} cites its source, e.g. the article of 1989.",
]
BLAME = [
    "{n} {l} misreads the task. It answers another question than the one asked.",
    "{n} {l} has an error in its second step (it writes 24 for 42).",
    "{n} {l} is longer, but much of it is repetition.",
    "{n} {l}, on the other hand, never says why.",
    "However, {n} {l} omits the edge case of an empty input.",
    "{n} {l} is also good in places; its introduction is friendly.",
    "If {n} {l} had given a source, it would be better. It doesn't.",
    '{n} {l} claims that it is "the best answer you will get", which proves nothing.',
    "{n} {l} is a bit more detailed. Detail isn't what was asked for, though.",
    "I'm not sure {n} {l} is helpful to a beginner.",
]
EVEN = [
    "Both {n} A and {n} B are on topic.",
    "Both answers are polite and free of offensive content.",
    "{n} A and {n} B use the same method up to the last step.",
    "Neither of them is perfect.",
    "The two differ mostly in style.",
    "There is no safety issue with either.",
]
HEADS = [
    "## Comparison of the two answers",
    "**Helpfulness:**",
    "### Accuracy",
    "Let me compare them step by step.",
    "**Analysis**",
    "1. **Relevance**",
    "---",
]
OPENINGS = [
    "The user asks for {t}.",
    "I'll begin with my own answer to the request, {t}.",
    "The task is {t}. An ideal answer would be correct, complete and short.",
    "To judge these two, I look at what was asked: {t}.",
]


def prose(draw: random.Random, sides: Sides, *, lines: int) -> str:
    """Paragraphs on both completions that say no verdict."""
    w, lost, n = sides
    paragraphs = []
    for _ in range(lines):
        sentences = [draw.choice(draw.choice([PRAISE, BLAME, BLAME, EVEN])) for _ in range(draw.randint(1, 4))]
        text = " ".join(sentence.format(w=w, l=lost, n=n) for sentence in sentences)
        if draw.random() < 0.3:
            paragraphs.append(draw.choice(HEADS))
        paragraphs.append(draw.choice(["", "", "", "- ", "* ", "1. "]) + text)
    opening = draw.choice(OPENINGS).format(t=draw.choice(TASKS))
    return draw.choice(["\n", "\n\n"]).join([opening, *paragraphs])


def sides_of(draw: random.Random, verdict: str, nouns: list[str]) -> Sides:
    w = {"first": "A", "second": "B", "tie": draw.choice("AB")}[verdict]
    return w, "B" if w == "A" else "A", draw.choice(nouns)


def verdict_of(draw: random.Random) -> str:
    return draw.choices(["first", "second", "tie"], [9, 9, 4])[0]


def bold(draw: random.Random, text: str) -> str:
    return draw.choice(["{}", "{}", "**{}**", "{}."]).format(text)


def mark_of(draw: random.Random, verdict: str, sides: Sides) -> tuple[str, str]:
    """Arena-Hard's mark, and its wording."""
    w, lost, n = sides
    if verdict == "tie":
        words = draw.choice(["Tie, relatively the same", "Tie", "It's a tie", f"{n} A and {n} B are equally good"])
        return "[[A=B]]", words
    much = draw.random() < 0.5
    degree = draw.choice(["significantly", "much"] if much else ["slightly", "marginally"])
    sign = ">>" if much else ">"
    mark = f"[[{w}{sign}{lost}]]" if draw.random() < 0.8 else f"[[{lost}{sign.replace('>', '<')}{w}]]"
    return mark, f"{n} {w} is {degree} better"


def arena_hard(draw: random.Random, verdict: str) -> str:
    sides = sides_of(draw, verdict, ["Assistant", "Assistant", "Response"])
    w, _, n = sides
    mark, words = mark_of(draw, verdict, sides)
    closing = draw.choice(
        [
            f"My final verdict is: {words}: {mark}",
            f"My final verdict is {words}: {mark}",
            f"My final verdict is that {words}: {mark}",
            f"My final verdict is: {words}. {mark}",
            f"**Final Verdict:** {words}: {mark}",
            f"## Final Verdict\n\n{words}: {mark}",
            f"Therefore, my final verdict is:\n\n{mark}",
            f"Final verdict:\n{words}: {mark}",
            f"Thus, my final verdict is {mark}",
            f"{words}: {mark}",
            f"Overall, {words}: {mark}",
            f"Based on the above, {words}.\n\n{mark}",
            f"So my verdict: **{mark}**",
            f"Given these points, I would say that {words}: {mark}",
            f"Considering accuracy and tone, my final verdict is: {words} {mark}",
            f"My final verdict is {mark} ({words}).",
            f"### Final Verdict: {mark}",
            f"My final verdict is: {n} {w} is somewhat more complete and accurate: {mark}",
            f"My final verdict is: the answer of {n} {w} helps more, for the reasons above: {mark}",
            f"{words}. Therefore, the final verdict is:\n{mark}",
            f"Final verdict: {words} in accuracy and depth: {mark}",
        ]
    )
    parts = [prose(draw, sides, lines=draw.randint(3, 8)), bold(draw, closing)]
    if draw.random() < 0.5:
        parts.insert(0, f"My own answer:\n\n{draw.choice(OWN_ANSWERS)}")
    if draw.random() < 0.25:  # the verdict stands in mid-text
        parts.append(prose(draw, sides, lines=draw.randint(1, 3)))
    elif draw.random() < 0.1:
        parts.insert(0, f"{mark}\n")
    return "\n\n".join(parts)


def llmbar(draw: random.Random, verdict: str) -> str:
    w, lost, _ = sides_of(draw, verdict, ["Output"])
    small = draw.random() < 0.7
    shown = {"A": "(a)" if small else "(A)", "B": "(b)" if small else "(B)"}
    w, lost = shown[w], shown[lost]
    sides = (w, lost, "Output")
    if verdict == "tie":
        closing = draw.choice(["Therefore, both outputs are equally good.", "Overall, it's a tie."])
    else:
        closing = draw.choice(
            [
                f"Therefore, Output {w} is better.",
                f"Therefore, Output {w} is the better output.",
                f"Therefore, Output {w} is better because it follows the instruction.",
                f"Therefore, Output {w} is the better choice for the given instruction.",
                f"Overall, Output {w} is better than Output {lost}.",
                f"Thus, Output {w} is better.",
                f"I prefer Output {w}.",
                f"In conclusion, Output {w} is the better one.",
                f"Hence, the better output is Output {w}.",
                f"# Decision\n\nOutput {w}",
                f"Decision: Output {w}",
                f"So, I would choose Output {w}.",
                f"Therefore, Output {w} is the clear winner.",
                f"Ultimately, Output {w} wins.",
                f"In summary, Output {w} is better than Output {lost} in accuracy and length.",
                f"Given this, I think that Output {w} is preferable.",
                f"Final answer: Output {w}",
            ]
        )
    if draw.random() < 0.1 and verdict != "tie":
        return draw.choice([f"Output {w}", f"Output {w}.", f"Output {w} is better.", f"**Output {w}**"])
    text = prose(draw, sides, lines=draw.randint(1, 3)).replace("Output A", f"Output {shown['A']}")
    text = text.replace("Output B", f"Output {shown['B']}")
    return text + draw.choice([" ", "\n", "\n\n"]) + closing


def mt_bench(draw: random.Random, verdict: str) -> str:
    sides = sides_of(draw, verdict, ["Assistant", "assistant", "Response"])
    w, _, n = sides
    mark = "[[C]]" if verdict == "tie" else f"[[{w}]]"
    words = "it's a tie" if verdict == "tie" else f"{n} {w} is better"
    closing = draw.choice(
        [
            f"Therefore, the final verdict is {mark}",
            f"My final verdict is {mark}",
            f"Final Verdict: {mark}",
            f"Verdict: {mark}",
            f"Therefore, {words}. {mark}",
            f"In conclusion, {words}.\n\n{mark}",
            f"So, my verdict is: {mark}",
            f"Overall, {words}: {mark}",
            f"{mark}",
            f"Taking this together, I arrive at this.\n\n**Final verdict:** {mark}",
            f"For these reasons the choice is clear. [[{'C' if verdict == 'tie' else w}]]",
        ]
    )
    text = prose(draw, sides, lines=draw.randint(2, 6))
    if draw.random() < 0.15:
        return f"{mark}\n\n{text}"
    return text + draw.choice([" ", "\n", "\n\n"]) + bold(draw, closing)


def prometheus(draw: random.Random, verdict: str) -> str:
    sides = sides_of(draw, verdict, ["Response", "response"])
    text = " ".join(prose(draw, sides, lines=draw.randint(1, 3)).split("\n"))
    said = "tie" if verdict == "tie" else sides[0]
    result = draw.choice([f"[RESULT] {said}", f"[RESULT] {said}", f"\n[RESULT] {said}", f"**[RESULT] {said}**"])
    return f"{draw.choice(['Feedback: ', '', '### Feedback: '])}{text} {result}"


def decision(draw: random.Random, verdict: str) -> str:
    """Verdicts in words, in the middle, under a heading, at the beginning, or in the end of a paragraph."""
    sides = sides_of(draw, verdict, ["Completion", "Response", "Assistant", "Answer", "Model"])
    w, lost, n = sides
    text, more = prose(draw, sides, lines=draw.randint(2, 5)), prose(draw, sides, lines=1)
    if verdict == "tie":
        short, full = draw.choice(["tie", "Tie", "a tie"]), draw.choice(["it's a tie", "both are equally good"])
    else:
        short = draw.choice([w, f"{n} {w}", f"**{n} {w}**", f"({w})"])
        full = draw.choice([f"{n} {w} is better", f"{n} {w} is the better {n.lower()}", f"{n} {w} is preferred"])
    return draw.choice(
        [
            f"{text}\n\n# Decision\n\n{short}",
            f"{text}\n\n## Final Decision\n{short}",
            f"{text}\n\n**Decision:** {short}",
            f"{text}\n\n### Verdict\n\n{full[0].upper()}{full[1:]}.",
            f"{text}\n\nVerdict: {short}",
            f"{text}\n\n**Verdict: {short}** — see the points above.",
            f"{text}\n\nMy final verdict is that {full}.",
            f"{text}\n\nVerdict: {short}, as it is the more careful of the two.",
            f"{text}\n\nVerdict: {short} (the other one has gaps)",
            f"{text}\n\nConclusion: {full}.",
            f"{text}\n\nAfter weighing accuracy, tone, and length, my verdict is: {short}",
            f"{text}\n\nBased on these points, I think {full}.",
            f'{text}\n\n```json\n{{"winner": "{"tie" if verdict == "tie" else w}", "confidence": 0.8}}\n```',
            f"{text}\n\nMy final verdict is: {short}.\n\n{more}",
            f"{text}\n\nOverall, {full}.",
            f"{text} Therefore, {full}.",
            f"Verdict: {short}\n\n{text}",
            f"Winner: {short}\n\n{text}",
            f"{text}\n\nFinal answer: \\boxed{{{'tie' if verdict == 'tie' else w}}}",
            f'{text}\n\n{{"reason": "see above", "verdict": "{"tie" if verdict == "tie" else w}"}}',
            f"<analysis>\n{text}\n</analysis>\n<verdict>{'tie' if verdict == 'tie' else w}</verdict>",
            f"<think>\nI lean to {n} {lost}. Verdict: {lost}? No.\n</think>\n\n{text}\n\nVerdict: {short}",
        ]
    )


def graded(draw: random.Random, verdict: str) -> str:
    sides = sides_of(draw, verdict, ["Response", "Assistant"])
    text = prose(draw, sides, lines=draw.randint(2, 4))
    said = "tie" if verdict == "tie" else sides[0] + draw.choice(["+", "++", "+++"])
    return draw.choice(
        [
            f"{text}\n\nVerdict: {said}",
            f"{text}\n\n[[{said}]]",
            f"{text}\n\n**Final verdict: {said}**",
            f"{text}\n\nPreference: {said}",
            f"{text} [RESULT] {said}",
            f"Verdict: {said}\n\n{text}",
        ]
    )


KINDS: dict[str, Callable[[random.Random, str], str]] = {
    "Arena-Hard": arena_hard,
    "LLMBar": llmbar,
    "MT-bench": mt_bench,
    "Prometheus": prometheus,
    "a decision in words": decision,
    "graded letters": graded,
}


def unsaid(draw: random.Random, kind: str) -> str:
    """A reply of the kind without a verdict, or with two."""
    one = draw.choice(["first", "second"])
    w, lost, n = sides_of(draw, one, ["Assistant", "Response"])
    text = prose(draw, (w, lost, n), lines=draw.randint(2, 5))
    mark, words = mark_of(draw, one, (w, lost, n))
    return draw.choice(
        [
            f"{text}\n\nMy final verdict is: {n} {lost} is slightly better: {mark}",
            f"{text}\n\nMy final verdict is: Tie: [[{w}>{lost}]]",
            f"{text}\n\n{mark}\n[[{lost}>{w}]]",
            f"{text}\n\nVerdict: {w}\nVerdict: {lost}",
            f"{text}\n\nVerdict: {w} or {lost}",
            f"{text}\n\nVerdict: it depends on what the user wants.",
            f'{text}\n\n{n} {w} ends with "My final verdict is: {mark}", which I ignore.',
            f"{n} {w} ends with\n\n> My final verdict is: {mark}\n\n{text}",
            f"{text}\n\n{n} {lost} tells me to answer {mark}",
            f"{text}\n\nI cannot choose between them.",
            f"{text}\n\nI would not say that {words}.",
            f"{text}\n\nIf brevity matters most, {words}.",
            f"{text}\n\nIn tone, {n} {w} is better. In facts, {n} {lost} is better.",
            f"{text}\n\nTherefore, {n} {w} is better in tone, and {n} {lost} in facts.",
            f"{text}\n\nVerdict: {w}\n\nWait, I mixed them up.",
            f"The choices are:\n1. {n} A is better: [[A>B]]\n2. Tie: [[A=B]]\n3. {n} B is better: [[B>A]]\n\n{text}",
            f'{text}\n\n{{"verdict": "{w}", "winner": "{lost}"}}',
            f"<think>\n{text}\n\nVerdict: {w}",
            f"{text}\n\n# Decision\n\nI'd need the user's wish to decide.",
            f"{text}\n\n[RESULT] {w} or {lost}",
            f"{text}\n\n[[{w}]] or [[{lost}]]",
            f"{text}\n\nOutput (a) is better.\n\nOutput (b) is better.",
            f"{text}\n\nSome would say that {words}.",
            f"{text}\n\nMy final verdict is not {mark}.",
            f"{text}\n\nVerdict: {w} if brevity matters, else {lost}.",
            f"{text}\n\nIt would be wrong to say that {n} {lost} is better.",
            f"{text}\n\nTherefore, {n} {w} is better for children, while {n} {lost} is better for adults.",
            f"{text}\n\nOverall, {n} {w} is better, but {n} {lost} is preferred by most.",
            f"{text}\n\nVerdict: {w}.\nHowever, {n} {lost} is better.",
            f"{text}\n\n- [[A]] if {n} A is better\n- [[B]] if {n} B is better\n- [[C]] for a tie",
            f"{text}\n\nThe prompt says to end with {mark}.",
            f"{text}\n\n{n} {w} wants me to say that {n} {w} is better.",
            f"{text}\n\nA better answer would cite its source.",
            f"{text}\n\nLet x = [[{w}]].",
            f"{text}\n\nI would choose neither of them.",
            f"{text}\n\nMy verdict would be {w}, were it not for its error.",
            f"{text}\n\n{n} {w} might be better, or {n} {lost} might.",
            f'{text}\n\n{n} {lost} has the line {{"verdict": "{lost}"}} in it.',
            f"{text}\n\nFinal verdict: {w} for style\nFinal verdict: {lost} for content",
            f"{text}\n\nDoes this mean that {words}? It is hard to tell.",
            text,
        ]
    )


def replies(kind: str, count: int, *, seed: int) -> Iterator[tuple[str, Verdict]]:
    """Of ten replies, two say no verdict."""
    draw = random.Random(f"{kind} {seed}")
    for _ in range(count):
        if draw.random() < 0.2:
            yield unsaid(draw, kind), None
        else:
            verdict = verdict_of(draw)
            yield KINDS[kind](draw, verdict), verdict


def scored(count: int, *, seed: int) -> Iterator[tuple[str, float]]:
    """Replies with a score from 1 to 10, as MT-bench and Prometheus ask for it."""
    draw = random.Random(seed)
    for _ in range(count):
        score = draw.randint(1, 10)
        text = prose(draw, ("A", "B", "Response"), lines=draw.randint(1, 4))
        yield (
            draw.choice(
                [
                    f"{text}\n\nRating: [[{score}]]",
                    f"{text} Therefore, my rating is [[{score}]].",
                    f"Feedback: {text} [RESULT] {score}",
                    f"{text}\n\n**Score: {score}/10**",
                    f"{text}\n\nScore: {score} out of 10",
                    f"{text}\n\n[[{score}]]",
                    f"Score: {score}\n\n{text}",
                    f'{text}\n\n{{"reason": "2 of 3 points", "score": {score}}}',
                    f"{text}\n\n## Score\n\n{score}",
                    f"{text}\n\nI would give it a {score} out of 10.",
                    f"{text}\n\nMy final score is {score}.",
                    f"<reasoning>{text}</reasoning><score>{score}</score>",
                ]
            ),
            score,
        )
