#!/usr/bin/env bash
# The tutorial with curl: tune a model that continues a number with the next one, and ask it.
# Start `tunesmith serve` first. Needs curl and jq.
set -euo pipefail
base_url=${base_url:-http://127.0.0.1:8080}
access_token=${access_token:-$(tunesmith token admin@localhost)}
project_id=${project_id:-my-project-id} # any label

call() {
    curl -sS --fail-with-body "$@" \
        -H 'Content-Type: application/json' \
        -H "Authorization: Bearer ${access_token}" \
        -H "x-goog-user-project: ${project_id}"
}

operation=$(call -X POST "$base_url/v1beta/tunedModels" -d '
  {
    "display_name": "number generator model",
    "base_model": "models/gemini-1.0-pro-001",
    "tuning_task": {
      "hyperparameters": {"batch_size": 2, "learning_rate": 0.001, "epoch_count": 5},
      "training_data": {
        "examples": {
          "examples": [
            {"text_input": "1", "output": "2"},
            {"text_input": "3", "output": "4"},
            {"text_input": "-3", "output": "-2"},
            {"text_input": "twenty two", "output": "twenty three"},
            {"text_input": "two hundred", "output": "two hundred one"},
            {"text_input": "ninety nine", "output": "one hundred"},
            {"text_input": "8", "output": "9"},
            {"text_input": "-98", "output": "-97"},
            {"text_input": "1,000", "output": "1,001"},
            {"text_input": "10,100,000", "output": "10,100,001"},
            {"text_input": "thirteen", "output": "fourteen"},
            {"text_input": "eighty", "output": "eighty one"},
            {"text_input": "one", "output": "two"},
            {"text_input": "three", "output": "four"},
            {"text_input": "seven", "output": "eight"}
          ]
        }
      }
    }
  }')
name=$(jq -r .name <<<"$operation")
modelname=$(jq -r .metadata.tunedModel <<<"$operation")
echo "tuning $modelname"

until [ "$(jq .done <<<"$operation")" = true ]; do
    sleep 1
    operation=$(call "$base_url/v1beta/$name")
    jq -r '.metadata | "\(.completedPercent // 0 | floor)%  loss \(.snapshots[-1].meanLoss // "-")"' <<<"$operation"
done
jq -e '.error | not' <<<"$operation" >/dev/null || {
    jq -r .error.message <<<"$operation" >&2
    exit 1
}

for text in 5 'sixty six' LXIII 六; do
    answer=$(call -X POST "$base_url/v1beta/$modelname:generateContent" \
        -d "$(jq -n --arg text "$text" '{contents: [{parts: [{text: $text}]}]}')")
    echo "$text -> $(jq -r '.candidates[0].content.parts[0].text' <<<"$answer")"
done
