"""Gemma's turns for text: there is no system role, so a system message opens the first user turn."""

from tasks.engine.models.families.family import ChatTemplate

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
