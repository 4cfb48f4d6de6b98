"""Another implementation, measured in a process of its own: `python -m benchmarks.rival`.

`benchmarks.speed` starts it for each turn, with a request on standard input, and reads the result
of `measure` from standard output, both in JSON. Nothing else is alive in the process: the threads
of PyTorch would slow llama.cpp down.
"""

import json
import sys
import time
from queue import Queue
from threading import Thread


class LlamaCpp:
    """By `xllamacpp`: its server writes a continuation of its own in a thread."""

    def __init__(self, request: dict):
        import xllamacpp

        self.prompt, self.n_new = request["ids"][: request["length"]], request["new_tokens"]
        params = xllamacpp.CommonParams()
        params.model.path = request["model"]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = len(request["ids"]) + 8, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        params.verbosity = -1
        self.server, self.tokens, self.own = xllamacpp.Server(params), Queue(), {}

    def prefill(self):
        request = {"prompt": self.prompt, "n_predict": self.n_new + 1, "temperature": 0.0,
                   "stream": True, "ignore_eos": True, "cache_prompt": False}
        self.thread = Thread(target=self.server.handle_completions,
                             args=(request, self.tokens.put), daemon=True)
        self.thread.start()
        self.step()  # the first token

    def step(self):
        found = self.tokens.get(timeout=600)
        if "error" in found:
            raise ValueError(f"llama.cpp: {found['error']}")
        self.own = found.get("timings", self.own)

    def report(self) -> dict:
        """What it measured itself. It says so with the last token."""
        self.thread.join()
        while not self.tokens.empty():
            self.step()
        return {"own_ms_per_token": self.own.get("predicted_per_token_ms")}


class HuggingFace:
    """`transformers`, with its default cache or the one that it offloads."""

    def __init__(self, request: dict):
        import torch
        import transformers

        from support.huge_pages import use_huge_pages

        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.request = torch, transformers, request
        self.device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
        if config := request["config"]:
            torch.set_default_dtype(dtype)
            with self.device:
                self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        else:
            self.model = transformers.LlamaForCausalLM.from_pretrained(
                request["model"], dtype=dtype).to(self.device)
        self.model.requires_grad_(False).eval()
        torch.set_num_threads(request["threads"])
        if self.device.type == "cuda":
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            for weight in self.model.parameters():
                weight.data = weight.data.clone()  # as in `load_model`: not a page of the file
            use_huge_pages()

    def prefill(self):
        self.cache = self.transformers.DynamicCache(config=self.model.config,
                                                    offloading=self.request["offloaded"])
        self.at = self.request["length"]
        self.run(self.request["ids"][: self.at])

    def run(self, ids):
        with self.torch.inference_mode():
            ids = self.torch.tensor([ids], device=self.device)
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            out.logits[0, -1].argmax().item()  # waits for a GPU

    def step(self):
        self.run([self.request["ids"][self.at]])
        self.at += 1

    def report(self) -> dict:
        config, found = self.model.config, {}
        if not self.request["offloaded"]:
            found["read_bytes"] = 2 * self.at * self.model.dtype.itemsize * (
                config.num_hidden_layers * config.num_key_value_heads * config.head_dim)
        if self.device.type == "cuda":
            found["peak_device_bytes"] = self.torch.cuda.max_memory_allocated() - self.before
        return found


KINDS = {"llama.cpp": LlamaCpp, "transformers": HuggingFace}


def measure(subject, n_tokens: int) -> dict:
    """Seconds to the first token, `ttft`, and of each of `n_tokens` more, `tokens`."""
    start = time.perf_counter()
    subject.prefill()
    times = [time.perf_counter()]
    for _ in range(n_tokens):
        subject.step()
        times.append(time.perf_counter())
    tokens = [after - before for before, after in zip(times, times[1:])]
    return {"ttft": times[0] - start, "tokens": tokens, **subject.report()}


def main() -> int:
    try:
        request = json.load(sys.stdin)
        answer = measure(KINDS[request["kind"]](request), request["new_tokens"])
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
