"""A server for the tests that speaks what the policy stage asks of vLLM 0.32, and runs a real model in float32.

What is asked for and answered was compared with vLLM's own (see docs/faster_and_larger.md): fields that a request leaves
out come from the model's generation config, every prompt of a request has one seed and each of its completions the next,
token ids end with the stop token, and a reload that fails leaves the engine dead.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

KNOWN = {"model", "prompt", "n", "max_tokens", "seed", "stop_token_ids", "temperature", "top_p", "top_k", "min_p",
         "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "logprobs",
         "return_token_ids"}  # fmt: skip


class VllmServer:
    """At `url`. `faults`, path → function of the answer, changes what is sent; with `sharper` ≠ 1 it is another model than
    the one whose weights it was given, in what it draws and in what it says of that."""

    def __init__(self, folder: str) -> None:
        self.folder, self.faults, self.sharper = folder, {}, 1.0
        self.dead, self.lock, self.asked = False, Lock(), []
        self._load(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: dict[str, Any] | None = None) -> None:
                outer.asked.append((self.path, body))
                with outer.lock:
                    code, found = outer.respond(self.path, body)
                fault = outer.faults.get(self.path)
                if fault is not None:
                    found = fault(found)
                if isinstance(found, int):
                    code, found = found, {"error": {"message": "asked to fail"}}
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = answer

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _load(self, folder: str) -> None:
        new = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if hasattr(self, "lm") and (new.config.vocab_size, new.config.hidden_size) != self.shape:
            raise AssertionError
        self.lm, self.shape = new, (new.config.vocab_size, new.config.hidden_size)
        if not hasattr(self, "defaults"):
            self.defaults = new.generation_config.to_dict()

    def respond(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.folder, "root": self.folder, "max_model_len": 64}]}
        if self.dead:
            return 500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            try:
                self._load(body["kwargs"]["weights_path"])
            except Exception as error:
                self.dead = True
                return 500, {"error": {"message": f"Worker failed with error '{error}'", "code": 500}}
            return 200, {"results": [None]}
        if path != "/v1/completions" or set(body) - KNOWN:
            return 404, {"detail": "Not Found"}
        if body["model"] != self.folder:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        if len(body["prompt"]) + body["max_tokens"] > 64:
            return 400, {"error": {"message": "This model's maximum context length is 64 tokens.", "code": 400}}
        return 200, {"object": "text_completion", "model": self.folder, "choices": self._complete(body)}

    def _warpers(self, body: dict[str, Any]) -> LogitsProcessorList:
        given = lambda name, neutral: body.get(name, self.defaults.get(name)) or neutral  # noqa: E731
        warpers: list[Any] = [TemperatureLogitsWarper(float(given("temperature", 1.0)))]
        warpers.append(RepetitionPenaltyLogitsProcessor(float(given("repetition_penalty", 1.0))))
        if (top_k := given("top_k", 0)) > 0:
            warpers.append(TopKLogitsWarper(top_k))
        return LogitsProcessorList(
            [*warpers, TopPLogitsWarper(given("top_p", 1.0)), MinPLogitsWarper(given("min_p", 0.0))]
        )

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        generators = [torch.Generator().manual_seed(body["seed"] + i) for i in range(body["n"])]
        tokens = torch.tensor([body["prompt"]] * body["n"])
        stops = {*body.get("stop_token_ids", []), *([] if body.get("ignore_eos") else [self.lm.config.eos_token_id])}
        warpers, log_probs = self._warpers(body), []
        for _ in range(body["max_tokens"]):
            logits = self.lm(tokens).logits[:, -1] * self.sharper
            p = warpers(tokens, logits).softmax(-1)
            race = torch.stack([torch.empty(p.shape[1]).exponential_(generator=g) for g in generators])
            drawn = (p / race).argmax(-1)
            log_probs.append(logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1))
            tokens = torch.cat([tokens, drawn[:, None]], 1)
        choices = []
        for i, row in enumerate(tokens[:, len(body["prompt"]) :].tolist()):
            length = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
            said = torch.stack(log_probs, 1)[i, :length].tolist()
            ended = "stop" if row[length - 1] in stops else "length"
            choices.append({"index": i, "text": "", "finish_reason": ended, "token_ids": row[:length],
                            "logprobs": {"token_logprobs": said}})  # fmt: skip
        return choices[::-1]  # in no order
