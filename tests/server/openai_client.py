"""The stock asynchronous `openai` client: sends what its input says, and prints what became of it.

Input: a line with an object of `address`, `model` and `requests`, each with `prompt`, `max_tokens` and `stream`; they
are all sent at once, greedy and past the end of sequence. A line "cancel" later cancels what has no answer.
Output: "ready", and when all have ended a list with an object for each request: `text`, `parts` (messages with text),
`finish_reason`, `prompt_tokens` and `tokens`, and `error` if it failed, with `status` and `message`.
"""

import asyncio
import io
import json
import threading

import httpx
import openai


async def answer(client, model, request, outcome):
    fields = {
        "model": model,
        "prompt": request["prompt"],
        "max_tokens": request["max_tokens"],
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    if not request["stream"]:
        whole = await client.completions.create(**fields)
        take(whole, outcome)
        return
    chunks = await client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    async for chunk in chunks:
        take(chunk, outcome)


def take(message, outcome):
    for choice in message.choices:
        outcome["text"] += choice.text
        outcome["parts"] += bool(choice.text)
        outcome["finish_reason"] = choice.finish_reason or outcome["finish_reason"]
    if message.usage is not None:
        outcome["prompt_tokens"], outcome["tokens"] = message.usage.prompt_tokens, message.usage.completion_tokens


async def outcome_of(client, model, request):
    outcome = {"text": "", "parts": 0, "finish_reason": None, "prompt_tokens": 0, "tokens": 0}
    try:
        await answer(client, model, request, outcome)
    except asyncio.CancelledError:
        outcome["error"] = {"status": "cancelled", "message": ""}
    except openai.APIError as error:
        outcome["error"] = {"status": getattr(error, "status_code", None), "message": str(error)}
    except httpx.HTTPError as error:  # of the connection, in the middle of a stream
        outcome["error"] = {"status": None, "message": f"{type(error).__name__}: {error}"}
    return outcome


async def main():
    print("ready", flush=True)
    # Unbuffered: a thread that is inside of a buffer when the interpreter ends would be a fatal error.
    lines = io.FileIO(0)
    job = json.loads(lines.readline())
    async with openai.AsyncOpenAI(
        base_url=f"{job['address']}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        tasks = [asyncio.ensure_future(outcome_of(client, job["model"], request)) for request in job["requests"]]
        loop = asyncio.get_running_loop()

        def listen():
            for line in lines:
                if line == b"cancel\n":
                    for task in tasks:
                        loop.call_soon_threadsafe(task.cancel)

        threading.Thread(target=listen, daemon=True).start()
        print(json.dumps(await asyncio.gather(*tasks)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
