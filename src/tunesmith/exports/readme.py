"""What an export says to who unpacks it: how to load it, and what to send so that it sees what it was tuned on."""

from tunesmith.base_models.prompts import PromptFormat
from tunesmith.exports import templates
from tunesmith.exports.tuned import Tuned

_PEFT = """\
---
base_model: {published}
library_name: peft
license_name: {licence}
---

# {title}

A LoRA adapter of `{published}`, tuned with Tunesmith.

## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{published}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"), ".")
prompt = {prompt}
tokens = tokenizer(prompt, return_tensors="pt"{no_specials})
answer = model.generate(**tokens, max_new_tokens={limit}, do_sample=False)[0, tokens["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
```

It was tuned on {version}: {description}
On other weights of the same model, such as those that the hub has, an answer may differ here and there. The export
with format SAFETENSORS has the very weights, with the adapter in them.
"""

_SAFETENSORS = """\
# {title}

A whole model for transformers, vLLM and whatever else reads their files, tuned with Tunesmith: the weights of
{version} with the adapter merged into them, in bfloat16.

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="bfloat16")
messages = [{{"role": "user", "content": "LXIII"}}]
tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
answer = model.generate(**tokens)[0, tokens["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
```

Or serve it: `vllm serve .`, and ask its chat endpoint. The chat template is the prompt format below, and
`generation_config.json` has what ends an answer.
"""

_OLLAMA = """\
# {title}

A model for Ollama, tuned with Tunesmith: a GGUF file with the weights of {version} and the adapter merged into
them, and a Modelfile with the prompt format and the model's own settings.

## Load it

```sh
ollama create {id} -f Modelfile
ollama run {id} LXIII
```

The GGUF file alone also runs in llama.cpp: `llama-server -m {file}`, and ask its chat endpoint.
"""

_ASKING = """
## What to send

It was tuned on texts of one form, and answers well when it sees the same. Chat endpoints make it of the messages.
For everything else, this is the text of the question `LXIII`, to its last character:

```
{prompt}
```

{start}{system}The answer {opening}ends with the token `{end}`. Its own temperature is {temperature:g}.

## Licence

{licence}. It applies to what was made of the base model, this included.
"""


def peft(tuned: Tuned, published: str) -> str:
    """Return the README of an adapter.

    Args:
        tuned: The tuned model.
        published: Its base model, as PEFT's users name it.
    """
    form = tuned.format
    start = templates.first_token(form)
    return _filled(
        _PEFT,
        tuned,
        published=published,
        prompt=repr(templates.prompt(form, "LXIII")),
        no_specials="" if start else ", add_special_tokens=False",
        limit=tuned.base.model.output_token_limit,
    )


def safetensors(tuned: Tuned) -> str:
    """Return the README of a whole model."""
    return _filled(_SAFETENSORS, tuned)


def ollama(tuned: Tuned, file: str) -> str:
    """Return the README beside a GGUF file of that name and its Modelfile."""
    return _filled(_OLLAMA, tuned, file=file)


def _filled(text: str, tuned: Tuned, **values: object) -> str:
    model = tuned.base.model
    about = {
        "title": tuned.title,
        "id": tuned.id,
        "version": tuned.base.version,
        "licence": model.licence,
        "description": model.description or model.display_name,
    }
    return text.format(**about | values) + _asking(tuned, tuned.format)


def _asking(tuned: Tuned, form: PromptFormat) -> str:
    start = templates.first_token(form)
    system = templates.prompt(form, "", "…").removesuffix(templates.prompt(form, ""))
    return _ASKING.format(
        prompt=templates.prompt(form, "LXIII"),
        start=f"Before it stands the token `{start}`, which most programs add by themselves. " if start else "",
        system=f"A system instruction comes first, as {system!r}. ",
        opening=f"begins with {form.answer!r}, which is no part of it, and " if form.answer else "",
        end=form.end.token,
        temperature=tuned.temperature,
        licence=tuned.base.model.licence,
    )
