"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PARTS = {
    exact: ["E", "exact", "KV of an equal beginning, used as it is"],
    continued: ["C", "continued", "fused KV that an earlier prompt left for the same beginning"],
    reused: ["R", "reused", "KV of the same text elsewhere, keys moved to their new positions"],
    recomputed: ["X", "recomputed", "reused, then computed again because it matters to the question"],
    gap: ["G", "gap", "new text between reused text, computed"],
    tail: ["T", "tail", "the rest with the question, computed in full"],
  };
  const partOf = (name) => (name === "prefix" ? "exact" : name);
  const number = (value) => value.toLocaleString("en");
  const percent = (value) => (value * 100).toLocaleString("en", { maximumFractionDigits: 1 }) + "%";
  const milliseconds = (value) =>
    value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 }) + " ms";
  const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(part of a character)";
  const shorten = (text, length) => (text.length > length ? text.slice(0, length) + " …" : text);
  const $ = (id) => document.getElementById(id);

  /** An element with a class, children and attributes; strings become text, never markup. */
  function make(tag, style, children = [], attributes = {}) {
    const element = document.createElement(tag);
    if (style) element.className = style;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...[children].flat().map((child) => (child instanceof Node ? child : String(child))));
    return element;
  }

  const total = data.pieces.length;
  const counts = Object.fromEntries(Object.keys(PARTS).map((part) => [part, 0]));
  for (const [part, start, end] of data.runs) counts[partOf(part)] += end - start;
  const originOf = new Array(total).fill(null);
  for (const origin of data.origins) originOf.fill(origin, origin.start, origin.end);
  const measured = data.relevance.filter((value) => value !== null).sort((a, b) => a - b);
  const cap = measured.length ? measured[Math.floor((measured.length - 1) * 0.995)] || 1 : 1;

  // ---- header and tiles

  $("name").textContent = data.name;
  const options = Object.entries(data.options).filter(([, value]) => value).map(([name, value]) => `${name} ${value}`);
  $("about").textContent = [data.model, `${number(total)} tokens`, `selector ${data.report.selector}`, ...options].join(" · ");
  const speedup = data.full.ttft / data.a3.ttft;
  const kept = counts.exact + counts.continued + counts.reused;
  const tiles = [
    [milliseconds(data.a3.ttft), "to the first token with a3"],
    [`${speedup.toFixed(1)}×`, `as fast as a full prefill (${milliseconds(data.full.ttft)})`],
    [percent(kept / total), "of the tokens not computed again"],
    data.parted === null ? ["equal", "answers, token by token"] : [`token ${data.parted + 1}`, "is the first in which the answers differ"],
  ];
  $("tiles").append(...tiles.map(([value, text]) => make("div", "tile", [make("b", "", value), make("span", "", text)])));

  // ---- the prompt

  const runs = [];
  function addRuns() {
    for (const [name, first, last] of data.runs) {
      // A run ends where its origin does, so that each has one.
      for (let start = first, end; start < last; start = end) {
        const origin = originOf[start];
        end = start + 1;
        while (end < last && originOf[end] === origin) end++;
        runs.push({ part: partOf(name), start, end, origin });
      }
    }
    for (const run of runs) {
      run.element = make("span", `run ${run.part}`, [], { role: "option", tabindex: "-1", "aria-selected": "false" });
      for (let i = run.start; i < run.end; i++) {
        const value = data.relevance[i];
        const token = make("span", "t", data.pieces[i] ? [data.pieces[i]] : [], { "data-i": i });
        if (data.pieces[i].includes("\n")) token.classList.add("line");
        if (value === null) token.classList.add("unknown");
        else token.style.setProperty("--h", Math.sqrt(Math.min(value / cap, 1)).toFixed(3));
        run.element.append(token);
      }
      run.text = data.pieces.slice(run.start, run.end).join("");
      run.element.setAttribute("aria-label", `${PARTS[run.part][1]}, ${source(run)}: ${shorten(run.text, 120)}`);
      $("prompt").append(run.element);
      run.mark = make("i", run.part, [], { style: `flex-grow: ${run.end - run.start}` });
      $("strip").append(run.mark);
    }
  }

  /** One sentence on where a run's KV came from. */
  function source({ part, start, origin }) {
    if (!origin) return "computed for this prompt";
    const at = number(origin.position + start - origin.start);
    const from = origin.donor === null ? "another prompt of the server" : origin.donor;
    return `${part === "recomputed" ? "copied and computed again, " : ""}from position ${at} of ${from}`;
  }

  const runOf = (element) => runs.find((run) => run.element === element);
  const shown = (run) => !run.element.classList.contains("off");
  let current;

  function select(run) {
    if (current) {
      current.element.tabIndex = -1;
      current.element.setAttribute("aria-selected", "false");
    }
    current = run;
    run.element.tabIndex = 0;
    run.element.setAttribute("aria-selected", "true");
  }

  function describe(run, from = run.start, to = run.end) {
    const { part, origin } = run;
    const values = data.relevance.slice(from, to).filter((value) => value !== null);
    const facts = [["tokens", to - from === 1 ? number(from) : `${number(from)} to ${number(to - 1)} (${number(to - from)})`]];
    if (origin) {
      const at = origin.position + from - origin.start;
      facts.push(["from", origin.donor ?? (origin.kind === "reused" ? "another prompt of the server" : "an earlier prompt with the same beginning")]);
      facts.push(["position there", to - from === 1 ? number(at) : `${number(at)} to ${number(at + to - from - 1)}`]);
      if (origin.tokens) facts[1][1] += ` (${number(origin.tokens)} tokens)`;
      facts.push(["span", `${number(origin.start)} to ${number(origin.end - 1)} of the prompt`]);
      facts.push(["donor's KV", origin.approximate ? "approximate (fused)" : "exact (full prefill)"]);
    } else facts.push(["from", "computed for this prompt"]);
    if (values.length) {
      const most = Math.max(...values);
      const rank = (measured.length - measured.findIndex((value) => value >= most)) / measured.length;
      const figure = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
      facts.push(["relevance", `${figure(most)}${values.length > 1 ? " at most" : ""}, top ${percent(rank)}`]);
    } else facts.push(["relevance", "not measured"]);
    $("details").replaceChildren(
      make("h3", "", [make("span", `letter ${part}`, PARTS[part][0]), PARTS[part][1]]),
      make("p", "", PARTS[part][2] + "."),
      make("dl", "", facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)])),
      make("blockquote", "", shorten(data.pieces.slice(from, to).join(""), 160) || "(part of a character)"),
      ...(origin?.beginning ? [make("p", "note", `${origin.donor} begins:`), make("blockquote", "", origin.beginning + " …")] : []),
    );
  }

  function move(step, block) {
    const here = runs.indexOf(current);
    let next = here + step;
    // A span is all that came from one place; what was computed is a span by itself.
    while (runs[next] && (!shown(runs[next]) || (block && current.origin && runs[next].origin === current.origin))) next += step;
    if (block && step < 0 && runs[next]?.origin) {
      const { origin } = runs[next];
      while (runs[next - 1]?.origin === origin && shown(runs[next - 1])) next--;
    }
    if (runs[next]) runs[next].element.focus();
  }

  const KEYS = {
    ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: () => move(1, true), ArrowUp: () => move(-1, true),
    Home: () => runs.find(shown)?.element.focus(), End: () => runs.findLast(shown)?.element.focus(),
  };

  addRuns();
  select(runs.find((run) => run.part === "reused" && run.end - run.start > 3) ?? runs[0]);
  describe(current);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  $("prompt").addEventListener("focusin", (event) => {
    const run = runOf(event.target);
    if (!run) return;
    select(run);
    describe(run);
  });
  $("prompt").addEventListener("pointerover", (event) => {
    const token = event.target.closest(".t");
    if (!token) return;
    const i = Number(token.dataset.i);
    describe(runOf(token.parentElement), i, i + 1);
  });
  $("prompt").addEventListener("pointerleave", () => describe(current));
  $("strip").addEventListener("click", (event) => runs.find((run) => run.mark === event.target)?.element.focus());

  // ---- legend and views

  const wanted = new Set();
  function filter() {
    for (const run of runs) {
      const off = wanted.size > 0 && !wanted.has(run.part);
      run.element.classList.toggle("off", off);
      run.mark.classList.toggle("off", off);
    }
    if (shown(current)) return;
    select(runs.find(shown));
    describe(current);
  }
  for (const [part, [letter, name, what]] of Object.entries(PARTS)) {
    const button = make("button", part, [make("span", "letter", letter, { "aria-hidden": "true" }), name, make("b", "", number(counts[part]))],
      { type: "button", "aria-pressed": "false", title: what, "data-part": part });
    button.disabled = !counts[part];
    button.addEventListener("click", () => {
      wanted.has(part) ? wanted.delete(part) : wanted.add(part);
      button.setAttribute("aria-pressed", String(wanted.has(part)));
      filter();
    });
    $("legend").append(button);
  }
  function view(name) {
    document.body.className = name;
    $("scale").hidden = name !== "relevance";
    $("scale").replaceChildren(...(measured.length
      ? ["low", make("i"), "high: what the question takes from the token. Grey: not measured. Wavy: recomputed."]
      : [`The selector ${data.report.selector} measured nothing for this prompt.`]));
  }
  $("views").addEventListener("change", (event) => view(event.target.value));
  view("parts");

  // ---- tables

  const head = (...names) => make("thead", "", make("tr", "", names.map((name, i) => make("th", i ? "number" : "", name, { scope: "col" }))));
  $("parts").append(
    head("", "tokens", "share"),
    make("tbody", "", Object.entries(PARTS).map(([part, [letter, name, what]]) => make("tr", part, [
      make("th", "", [make("span", "letter", letter, { "aria-hidden": "true" }), name, make("div", "what note", what)], { scope: "row" }),
      make("td", "number", number(counts[part])), make("td", "number", percent(counts[part] / total)),
    ]))),
  );
  $("reason").textContent = data.report.reason ? `Not fused: ${data.report.reason}.` : "";
  $("charged").textContent = data.report.reason ? "" : `Between prefix and tail ${percent(data.report.charged)} of a full prefill's rows were computed, the probe's included.`;

  const slowest = Math.max(data.a3.ttft, data.full.ttft);
  for (const [name, style, said] of [["a3", "a3", data.a3], ["full prefill", "full", data.full]]) {
    const runsOf = said.times.length > 1 ? `median of ${said.times.map(milliseconds).join(", ")}` : "one run";
    $("times").append(make("div", `time ${style}`, [
      make("span", "", name), make("i", "", [], { style: `width: ${(said.ttft / slowest) * 100}%` }),
      make("b", "number", milliseconds(said.ttft)), make("small", "", runsOf),
    ]));
  }
  const STAGES = {
    copy_ms: ["copy", "spans to their new positions"], probe_ms: ["probe", "the question reads the reused KV"],
    select_ms: ["select", "which tokens are recomputed"], recompute_ms: ["recompute", "chosen tokens and gaps, together with the tail if they fit one pass"],
    tail_ms: ["tail", "if it needed a separate pass"],
  };
  const stages = Object.entries(data.stages).filter(([, value]) => value > 0);
  if (stages.length) {
    $("stages").append(head("stages of the first run", "time"), make("tbody", "", stages.map(([key, value]) => make("tr", "", [
      make("th", "", [STAGES[key]?.[0] ?? key, make("div", "what note", STAGES[key]?.[1] ?? "")], { scope: "row" }),
      make("td", "number", milliseconds(value)),
    ]))));
  }

  // ---- answers

  $("verdict").textContent = data.parted === null
    ? "With a3 the answer is the same as after a full prefill, token by token."
    : `The first ${number(data.parted)} tokens are equal, then the answers part.`;
  for (const [name, said] of [["a3", data.a3], ["full prefill", data.full]]) {
    const at = data.parted ?? said.pieces.length;
    $("answers").append(make("div", "said", [make("h3", "", name), make("div", "", [
      said.pieces.slice(0, at).join(""),
      ...(at < said.pieces.length ? [make("mark", "", said.pieces[at]), make("span", "rest", said.pieces.slice(at + 1).join(""))] : []),
    ])]));
  }
  if (data.candidates) {
    $("candidates").append(make("p", "", [`The most likely tokens at answer token ${data.parted + 1}, where both had the same text before it:`]));
    const columns = make("div", "columns");
    const likeliest = Math.max(...data.candidates.flat().map(({ logprob }) => logprob));
    ["a3", "full prefill"].forEach((name, i) => {
      const rows = data.candidates[i].map(({ text, logprob, taken }) => make("tr", taken ? "taken" : "", [
        make("td", "", visible(text) + (taken ? " ✓" : "")),
        make("td", "chance", make("i", "", [], { style: `width: ${Math.exp(logprob - likeliest) * 100}%` })),
        make("td", "number", percent(Math.exp(logprob))), make("td", "number", logprob.toFixed(2)),
      ]));
      columns.append(make("div", "next", [make("h3", "", `next token, ${name}`),
        make("table", "", [head("token", "", "probability", "logprob"), make("tbody", "", rows)])]));
    });
    $("candidates").append(columns);
  }
})();
