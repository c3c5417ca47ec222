"""Entries as the data cards and the tools' own documentation show them, and the conversation that each means."""

import json

Q, A = "what color is the square ?", "the square is red ."
ONE = ("", ((Q, A),))
TWO = ("", ((Q, A), ("where ?", "left")))
KIND = ("answer directly .", ((Q, A),))
RATINGS = {
    "relevance_ratings": [4],
    "relevance_min": 4,
    "visual_dependency_ratings": [5],
    "visual_dependency_min": 5,
    "image_correspondence_ratings": [3],
    "image_correspondence_min": 3,
    "formatting_ratings": [4],
    "formatting_min": 4,
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


U, B = user(Q), assistant(A)
PICTURED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}
WORSE = assistant("blue")
GOOD_PARTS, BAD_PARTS = (assistant([{"type": "text", "text": text}]) for text in (A, "blue"))

# As the data cards and the tools' own documentation show them; each entry has the one picture a.png.
PUBLISHED = {
    "the_cauldron": (ONE, {"images": ["a.png"], "texts": [{"user": Q, "assistant": A, "source": "VQAv2"}]}),
    "the_cauldron, rounds": (
        TWO,
        {"images": ["a.png"], "texts": [{"user": Q, "assistant": A}, {"user": "where ?", "assistant": "left"}]},
    ),
    "finevision": (
        ONE,
        {"images": ["a.png"], "texts": [{"user": Q, "assistant": A}], "source": "lrv_chart", **RATINGS},
    ),
    "texts as a dict of lists": (
        TWO,
        {"images": ["a.png"], "texts": {"user": [Q, "where ?"], "assistant": [A, "left"], "source": ["x", "y"]}},
    ),
    "sharegpt4v": (ONE, {"id": "000000000009", "image": "a.png", "conversations": [human(f"{Q}\n<image>"), gpt(A)]}),
    "sharegpt, llama-factory": (
        KIND,
        {"images": ["a.png"], "conversations": [human(f"<image>{Q}"), gpt(A)], "system": KIND[0], "tools": ""},
    ),
    "sharegpt, system in front": (
        KIND,
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": "answer directly ."},
                human(f"<image>{Q}"),
                {"from": "chatgpt", "value": A},
            ],
        },
    ),
    "sharegpt, dict of lists": (
        ONE,
        {"image": "a.png", "conversations": {"from": ["human", "gpt"], "value": [f"<image>\n{Q}", A]}},
    ),
    "sharegpt, better answer beside": (
        ONE,
        {"images": ["a.png"], "conversations": [human(f"<image>{Q}")], "chosen": gpt(A), "rejected": gpt("blue")},
    ),
    "sharegpt as json": (ONE, {"image": "a.png", "conversations": json.dumps([human(Q), gpt(A)])}),
    "llava, the model begins": (
        ONE,
        {"image": "a.png", "conversations": [gpt("hello"), human(f"<image>\n{Q}"), gpt(A)]},
    ),
    "ms-swift messages": (
        KIND,
        {"messages": [{"role": "system", "content": KIND[0]}, user(f"<image>{Q}"), B], "images": ["a.png"]},
    ),
    "ms-swift, bytes and path": (
        ONE,
        {"messages": [user(f"<image>{Q}"), B], "images": [{"bytes": None, "path": "a.png"}]},
    ),
    "ms-swift, preferences": (ONE, {"messages": [U, B], "rejected_response": "blue", "images": ["a.png"]}),
    "ms-swift sharegpt": (
        ("answer directly .", TWO[1]),
        {
            "system": KIND[0],
            "conversation": [{"human": Q, "assistant": A}, {"human": "where ?", "assistant": "left"}],
            "images": ["a.png"],
        },
    ),
    "ms-swift query": (ONE, {"query": f"<image>{Q}", "response": A, "images": ["a.png"]}),
    "ms-swift history": (
        ("answer directly .", TWO[1]),
        {"system": KIND[0], "query": "where ?", "response": "left", "history": [[Q, A]], "images": ["a.png"]},
    ),
    "trl messages": (
        ONE,
        {"messages": [PICTURED, {"role": "assistant", "content": [{"type": "text", "text": A}]}], "images": ["a.png"]},
    ),
    "trl prompt": (ONE, {"prompt": Q, "completion": f" {A}", "image": "a.png"}),
    "trl prompt, messages": (ONE, {"prompt": [PICTURED], "completion": [assistant(A)], "images": ["a.png"]}),
    "trl prompt, a system prompt": (
        KIND,
        {"prompt": [{"role": "system", "content": KIND[0]}, U], "completion": [B], "images": ["a.png"]},
    ),
    "trl prompt, longer": (
        TWO,
        {"prompt": [U, B, user("where ?")], "completion": [assistant("left")], "images": ["a.png"]},
    ),
    "trl preferences": (ONE, {"prompt": Q, "chosen": A, "rejected": "blue", "image": "a.png"}),
    "trl preferences, messages": (ONE, {"prompt": [PICTURED], "chosen": [B], "rejected": [WORSE], "images": ["a.png"]}),
    "trl preferences, prompt inside": (
        ONE,
        {"chosen": [PICTURED, GOOD_PARTS], "rejected": [PICTURED, BAD_PARTS], "images": ["a.png"]},
    ),
    "ultrafeedback": (ONE, {"prompt": Q, "chosen": [U, B], "rejected": [U, WORSE], "image": "a.png"}),
    "rlaif-v": (ONE, {"question": Q, "chosen": A, "rejected": "blue", "image": "a.png", "ds_name": "x"}),
    "alpaca": (("", ((f"color ?\n{Q}", A),)), {"instruction": "color ?", "input": Q, "output": A, "image": "a.png"}),
    "alpaca, llama-factory": (
        ("answer directly .", TWO[1]),
        {
            "instruction": "where ?",
            "input": "",
            "output": "left",
            "system": KIND[0],
            "history": [[f"<image>{Q}", A]],
            "images": ["a.png"],
        },
    ),
    "alpaca, preferences": (ONE, {"instruction": Q, "input": "", "chosen": A, "rejected": "blue", "images": ["a.png"]}),
    "dolly": (("", ((f"color ?\n{Q}", A),)), {"instruction": "color ?", "context": Q, "response": A, "image": "a.png"}),
    "problem": (ONE, {"problem": Q, "solution": A, "answer": "red", "image": "a.png"}),
    "input and output": (ONE, {"input": Q, "output": A, "image": "a.png"}),
    "imagefolder": (("", (("", A),)), {"file_name": "a.png", "text": A}),
    "vqa": (ONE, {"question": Q, "answers": {"answer": [A, "red", A], "answer_id": [1, 2, 3]}, "image": "a.png"}),
    "nested dict of lists": (
        ONE,
        {
            "messages": {
                "role": ["user", "assistant"],
                "content": [{"type": ["image", "text"], "text": [None, Q]}, {"type": ["text"], "text": [A]}],
            },
            "images": ["a.png"],
        },
    ),
}
