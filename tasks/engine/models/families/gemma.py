"""Gemma: pre-norm blocks, norms stored as gain - 1; and the turns that all Gemmas share."""

from tasks.engine.models.family import PRE_NORM_WRITERS, ChatTemplate, Family

# There is no system role, so a system message opens the first user turn.
GEMMA_TURNS = ChatTemplate(
    name="gemma",
    token="<start_of_turn>",
    jinja=(
        "{{ bos_token }}{% set has_system = messages[0]['role'] == 'system' %}"
        "{% for message in (messages[1:] if has_system else messages) %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
        "+ (messages[0]['content'] | trim + '\n\n' if has_system and loop.first else '') "
        "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
)

FAMILY = Family(
    name="Gemma",
    model_types=("gemma",),
    norms_are_gain_minus_1=True,
    residual_writers=PRE_NORM_WRITERS,
    chat_template=GEMMA_TURNS,
)
