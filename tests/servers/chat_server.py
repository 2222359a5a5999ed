"""A small OpenAI-compatible server over a real model, run as a process of its own by the tests.

It knows ``seed``, ``logprobs``/``top_logprobs`` and ``continue_final_message`` as vLLM does. ``PUT /`` sets how it
misbehaves (see ``DEFAULTS``) and forgets what it has seen; ``GET /`` returns what it has seen.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEFAULTS = {
    "fail": 0,  # first requests that are answered with `status`
    "status": 503,
    "logprobs": True,
    "whole": False,  # send a continued turn whole, as the llama.cpp server does
    "delay": 0.0,  # seconds before an answer
}
model_path = sys.argv[1]

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
lock = threading.Lock()
UNSEEN = {"requests": 0, "active": 0, "peak": 0, "authorization": None, "last": None}
seen, settings = dict(UNSEEN), dict(DEFAULTS)


def encode(body: dict) -> torch.Tensor:
    continues = bool(body.get("continue_final_message"))
    text = tokenizer.apply_chat_template(
        body["messages"],
        tokenize=False,
        add_generation_prompt=body.get("add_generation_prompt", True),
        continue_final_message=continues,
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@torch.inference_mode()
def complete(body: dict) -> dict:
    ids = encode(body)
    prompt = ids.shape[1]
    generator = torch.Generator().manual_seed(body.get("seed") or 0)
    finish, listed, tokens = "length", [], []
    for _ in range(body["max_tokens"]):
        logits = model(input_ids=ids).logits[0, -1]
        temperature = body.get("temperature", 1.0)
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if body.get("logprobs") and settings["logprobs"]:
            top = logits.log_softmax(-1).topk(body["top_logprobs"])
            alternatives = [
                {"token": tokenizer.decode([int(index)]), "logprob": float(value), "bytes": None}
                for value, index in zip(top.values, top.indices, strict=True)
            ]
            listed.append({**alternatives[0], "top_logprobs": alternatives})
        if token == tokenizer.eos_token_id:
            finish = "stop"
            break
        tokens.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if settings["whole"] and body.get("continue_final_message"):
        text = body["messages"][-1]["content"] + text
    return {
        "id": "1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": listed, "refusal": None} if listed else None,
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200, seen)

    def do_PUT(self) -> None:
        settings.update(DEFAULTS | json.loads(self.rfile.read(int(self.headers["content-length"]))))
        seen.update(UNSEEN)
        self.answer(200, settings)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with lock:
            seen["requests"] += 1
            number = seen["requests"]
            seen["active"] += 1
            seen["peak"] = max(seen["peak"], seen["active"])
            seen["authorization"] = self.headers["authorization"]
            seen["last"] = {name: value for name, value in body.items() if name != "messages"}
        try:
            if number <= settings["fail"]:
                self.answer(settings["status"], {"error": {"message": "not now"}})
            elif not self.path.endswith("/v1/chat/completions") or body["model"] != "tiny":
                self.answer(404, {"error": {"message": "no such model"}})
            else:
                time.sleep(settings["delay"])
                with lock:
                    reply = complete(body)
                self.answer(200, reply)
        finally:
            with lock:
                seen["active"] -= 1

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)  # noqa: T201 - the port, for the test that started the process
server.serve_forever()
