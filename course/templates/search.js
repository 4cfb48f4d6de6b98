const SECTIONS = {{ sections|safe }};
