// Parts of a prompt by where their KV came from: name in the report, name on the page, meaning.
const PARTS = [
  ["prefix", "exact", "the prompt begins like an earlier one, whose KV is used as it is"],
  ["continued", "continued", "the prompt begins like an earlier one that was fused, whose KV is used as it is"],
  ["reused", "reused", "known text at another position: its KV is copied and rotated"],
  ["recomputed", "recomputed", "known text that matters most to the question, computed again"],
  ["gap", "gap", "new text between known text"],
  ["tail", "tail", "the question, and what else comes after the last known text"],
];
const COMPUTED = ["recomputed", "gap", "tail"];
const $ = (selector, root = document) => root.querySelector(selector);
const count = (number) => number.toLocaleString("en");

/** An element; texts are only ever added as text, so nothing in a document or an answer is markup. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function lost() {
  throw new Error("The app does not answer. Is it still running?");
}

async function request(path, options) {
  const response = await fetch(path, options).catch(lost);
  if (response.ok) return response;
  const { detail } = await response.json().catch(() => ({}));
  throw new Error(typeof detail === "string" ? detail : `The app answered with error ${response.status}.`);
}

/** The events of a route, which answers with a line of JSON for each. */
async function* events(path, options) {
  const reader = (await request(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", read; !(read = await reader.read().catch(lost)).done; ) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// Documents

let uploads = Promise.resolve();

/** Upload or prefill, one after the other, and show the progress. */
function send(tasks) {
  uploads = uploads.then(() => work(tasks));
  return uploads;
}

async function work(tasks) {
  const progress = $("#progress");
  const errors = [];
  $("#upload-error").textContent = "";
  progress.hidden = false;
  for (const { name, path, body } of tasks) {
    $("#upload-status").textContent = `${name}: sending`;
    progress.removeAttribute("value");
    try {
      for await (const { type, done, of, computed, message } of events(path, { method: "POST", body })) {
        if (type === "error") throw new Error(message);
        Object.assign(progress, { max: of, value: done });
        $("#upload-status").textContent = `${name}: ${done} of ${of} passages prefilled, ${count(computed)} tokens computed`;
      }
    } catch (error) {
      $("#upload-status").textContent = "";
      errors.push(error.message);
    }
  }
  progress.hidden = true;
  await list().catch((error) => errors.push(error.message));
  $("#upload-error").textContent = errors.join("\n");
}

async function list() {
  const documents = await (await request("documents")).json();
  $("#documents").replaceChildren(...documents.map(({ name, passages }) => {
    const remove = element("button", { className: "quiet", textContent: "Remove", ariaLabel: `Remove ${name}` });
    remove.onclick = () => request(address(name), { method: "DELETE" }).then(list).catch(complain);
    const size = element("small", { textContent: `${passages} passage${passages === 1 ? "" : "s"}` });
    return element("li", {}, element("span", { textContent: name }), size, remove);
  }));
  $("#prefill").hidden = !documents.length;
}

const complain = (error) => ($("#upload-error").textContent = error.message);
const address = (name) => `documents?name=${encodeURIComponent(name)}`;
const sendFiles = (files) => send([...files].map((file) => ({ name: file.name, path: address(file.name), body: file })));

$("#files").onchange = async ({ target }) => {
  await sendFiles(target.files);
  target.value = "";
};
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("#drop").classList.toggle("over", type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) sendFiles(event.dataTransfer.files);
  });
}
$("#paste form").onsubmit = async (event) => {
  event.preventDefault();
  const { name, text } = event.target.elements;
  await send([{ name: name.value, path: address(name.value), body: text.value }]);
  if (!$("#upload-error").textContent) event.target.reset();
};
$("#prefill").onclick = () => send([{ name: "All documents", path: "prefill" }]);

// Questions

$("#ask").onsubmit = (event) => {
  event.preventDefault();
  ask(event.target.question.value.trim());
};
$("#question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("#ask button").disabled) $("#ask").requestSubmit();
};

async function ask(question) {
  const button = $("#ask button");
  if (!question || button.disabled) return;
  button.disabled = true;
  const card = $("#answer").content.cloneNode(true).firstElementChild;
  $("h3", card).textContent = question;
  $("button", card).onclick = () => ask(question);
  $("#answers").prepend(card);
  const compare = $("#ask [name=compare]").checked;
  const headers = { "Content-Type": "application/json" };
  try {
    for await (const event of events("ask", { method: "POST", headers, body: JSON.stringify({ question, compare }) })) {
      show[event.type](card, event, compare);
    }
  } catch (error) {
    show.error(card, error);
  }
  $(".text", card).ariaBusy = "false";
  button.disabled = false;
}

/** What each event of an answer changes in its card. */
const show = {
  sources(card, { sources }) {
    $(".sources summary", card).textContent = `${sources.length} passages in the prompt`;
    $(".sources", card).hidden = false;
    $(".sources", card).append(...sources.map(({ document, text }) => element("figure", {},
      element("figcaption", { textContent: document }), element("blockquote", { textContent: text }))));
  },
  text(card, { text }) {
    $(".text", card).append(text);
  },
  done(card, { a3, prompt_tokens, ttft_ms }, compare) {
    $(".text", card).ariaBusy = "false";
    if (!$(".text", card).textContent) $(".text", card).textContent = "(The answer is empty.)";
    $(".measured", card).hidden = false;
    if (a3) reuse(card, a3, prompt_tokens);
    else $(".summary", card).textContent = "The model server reports no reuse: it runs without a3.";
    $(".times .a3", card).textContent = milliseconds(ttft_ms);
    card.dataset.ttft = ttft_ms;
    $(".times .full", card).textContent = compare ? "measuring" : "not measured";
  },
  full(card, { ttft_ms }) {
    const longer = ttft_ms / card.dataset.ttft;
    $(".times .full", card).textContent = `${milliseconds(ttft_ms)}, ${longer.toFixed(1)} times as long`;
    length($(".times .a3", card), Math.min(1, 1 / longer));
    length($(".times .full", card), Math.min(1, longer));
  },
  error(card, { message }) {
    $(".error", card).textContent = message;
    if ($(".times .full", card).textContent === "measuring") $(".times .full", card).textContent = "not measured";
  },
};

const milliseconds = (number) => `${count(Math.round(number))} ms`;
const length = (cell, share) => cell.style.setProperty("--share", `${share * 100}%`);

function reuse(card, a3, total) {
  const computed = COMPUTED.reduce((sum, part) => sum + a3[part], 0);
  $(".summary", card).textContent = `Computed ${count(computed)} of the prompt's ${count(total)} tokens`
    + (a3.reason ? `; not fused: ${a3.reason}` : "");
  const shown = PARTS.filter(([part]) => a3[part]);
  $(".bar", card).ariaLabel = shown.map(([part, name]) => `${a3[part]} ${name}`).join(", ");
  $(".bar", card).append(...shown.map(([part, name]) => {
    const piece = element("i", { className: part, title: `${name}: ${count(a3[part])}` });
    piece.style.flexGrow = a3[part];
    return piece;
  }));
  $(".counts", card).append(...shown.map(([part, name]) => element("li", {},
    element("i", { className: part }), `${name} `, element("b", { className: `count-${part}`, textContent: count(a3[part]) }))));
}

$("#parts").append(...PARTS.flatMap(([part, name, meaning]) => [
  element("dt", {}, element("i", { className: part }), name), element("dd", { textContent: meaning })]));
list().catch(complain);
