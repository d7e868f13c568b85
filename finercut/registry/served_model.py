"""Runs a registered version in `mlflow.pyfunc`: text in, text out. MLflow stores this file beside the checkpoint.

It imports nothing of finercut: it must load where only mlflow, torch and transformers are installed. MLflow also runs
this file whenever a version is registered, which needs no model: so the libraries wait for one.
"""

from pathlib import Path

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

CHECKPOINT = Path(__file__).parent / "checkpoint"


def attention_of(config):
    """The attention that the model was evaluated with: transformers' default one does not apply soft caps."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


class ServedModel(PythonModel):
    """Greedy continuation of each prompt."""

    def load_context(self, context):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        # The checkpoint's own files, uploaded with it, serve where finercut is not installed.
        self.tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=True)
        # The config has the defaults of its class: config.json need not name a soft cap.
        config = AutoConfig.from_pretrained(CHECKPOINT, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype="auto", trust_remote_code=True, **attention_of(config)
        )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        """
        Args:
            model_input: one column, the prompts
            params: max_new_tokens

        Returns:
            the continuations, without their prompts
        """
        max_new_tokens = (params or {}).get("max_new_tokens", 64)
        return [self._continue(prompt, max_new_tokens) for prompt in model_input.iloc[:, 0]]

    def _continue(self, prompt, max_new_tokens):
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.model.device)
        if not inputs["input_ids"].shape[1]:
            raise ValueError(f"the prompt {prompt!r} has no tokens to continue: give some text")
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


set_model(ServedModel())
