"""The stock `tritonclient`: sends what its input says, and prints what became of it.

Input and output are those of `openai_client`. What is not streamed goes through `async_infer`, the rest over four
streams. An error on a stream does not name its request: the oldest open one of the stream is said to have it.

It needs a process of its own, since its protobuf definitions clash with the server's.
"""

import io
import json
import queue
import threading

import numpy as np
import tritonclient.grpc as triton

_STREAMS = 4


class Sender:
    """Sends requests and collects their outcomes.

    Attributes:
      events: (requests that it may be of, result, error), or None to cancel what is open.
    """

    def __init__(self, job):
        self.events = queue.Queue()
        self._requests = job["requests"]
        self._model = job["model"]
        self._outcomes = [
            {"text": "", "parts": 0, "finish_reason": None, "prompt_tokens": 0, "tokens": 0} for _ in self._requests
        ]
        self._open = set(range(len(self._requests)))
        self._unary = triton.InferenceServerClient(job["address"])
        self._streams = [triton.InferenceServerClient(job["address"]) for _ in range(_STREAMS)]
        self._calls = []

    def run(self):
        streamed = [number for number, request in enumerate(self._requests) if request["stream"]]
        for place, client in enumerate(self._streams):
            mine = streamed[place::_STREAMS]
            client.start_stream(lambda result, error, mine=mine: self.events.put((mine, result, error)))
            for number in mine:
                client.async_stream_infer(self._model, **self._fields(number))
        for number, request in enumerate(self._requests):
            if not request["stream"]:
                self._calls.append(
                    self._unary.async_infer(
                        self._model,
                        callback=lambda result, error, mine=(number,): self.events.put((mine, result, error)),
                        **self._fields(number),
                    )
                )
        while self._open:
            event = self.events.get()
            if event is None:
                self._cancel()
            else:
                self._take(*event)
        for client in self._streams:
            client.stop_stream()
        return self._outcomes

    def _fields(self, number):
        request = self._requests[number]
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([request["prompt"].encode()], dtype=np.object_))
        parameters = {"max_tokens": request["max_tokens"], "temperature": 0.0, "ignore_eos": True}
        return {"inputs": [text], "parameters": parameters, "request_id": str(number)}

    def _cancel(self):
        for call in self._calls:
            call.cancel()
        for client in self._streams:
            client.stop_stream(cancel_requests=True)

    def _take(self, mine, result, error):
        if error is not None:
            still_open = [number for number in mine if number in self._open]
            # One with a status has ended the whole call.
            for number in still_open if error.status() else still_open[:1]:
                status = str(error.status()).removeprefix("StatusCode.").lower() if error.status() else None
                self._outcomes[number]["error"] = {"status": status, "message": error.message()}
                self._open.discard(number)
            return
        response = result.get_response()
        number = int(response.id)
        outcome, values = self._outcomes[number], response.parameters
        text = result.as_numpy("text_output")[0].decode()
        outcome["text"] += text
        outcome["parts"] += bool(text)
        outcome["finish_reason"] = result.as_numpy("finish_reason")[0].decode() or outcome["finish_reason"]
        if "completion_tokens" in values:
            outcome["prompt_tokens"] = values["prompt_tokens"].int64_param
            outcome["tokens"] = values["completion_tokens"].int64_param
            self._open.discard(number)


def main():
    print("ready", flush=True)
    # Unbuffered: a thread that is inside of a buffer when the interpreter ends would be a fatal error.
    lines = io.FileIO(0)
    sender = Sender(json.loads(lines.readline()))

    def listen():
        for line in lines:
            if line == b"cancel\n":
                sender.events.put(None)

    threading.Thread(target=listen, daemon=True).start()
    print(json.dumps(sender.run()), flush=True)


if __name__ == "__main__":
    main()
