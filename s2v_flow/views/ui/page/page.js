// The page of `s2vflow ui`: no library, no build step. The calls are described in docs/ui.md.
const $ = (id) => document.getElementById(id);
const EXPLAINED = { RUN: "to run", RESUME: "goes on", HIT: "stored", LOAD: "loads", SKIP: "not needed", LIVE: "as used" };
const wish = { source: "", profiles: [], values: {}, name: "" };
const own = {}; // what was dropped: image and audio, kept when another recipe is chosen
let fields = [], shown = [], chosen = [], planned = 0, jobsText = "", timer = 0;

function make(tag, given = {}, ...children) {
  const { data = {}, ...rest } = given;
  const made = Object.assign(document.createElement(tag), rest);
  Object.entries(data).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...children.filter((child) => child !== null));
  return made;
}

async function call(path, body, method = body === undefined ? "GET" : "POST") {
  const isFile = body instanceof Blob;
  const sent = body === undefined ? undefined : isFile ? body : JSON.stringify(body);
  const answer = await fetch(path, { method, body: sent });
  const found = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(found.fix ? `${found.error}\nfix: ${found.fix}` : found.error);
  return found;
}

// Show a list anew; what is the same stays: a video goes on playing, and who uses keys stays where he was.
function renew(list, items, build) {
  const known = new Map([...list.children].map((child) => [child.told, child]));
  const at = [...list.children].findIndex((child) => child.contains(document.activeElement));
  const made = items.map((item) => { const told = JSON.stringify(item); return Object.assign(known.get(told) ?? build(item), { told }); });
  [...list.children].filter((child) => !made.includes(child)).forEach((child) => child.remove());
  made.forEach((child, index) => child === list.children[index] || list.insertBefore(child, list.children[index] ?? null));
  if (at >= 0 && !list.contains(document.activeElement)) list.children[Math.min(at, made.length - 1)]?.querySelector("button, a")?.focus();
}

function tell(text) {
  $("told").textContent = text;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => ($("told").textContent = ""), 6000);
}

const trying = (work) => work().catch((error) => ($("problem").textContent = error.message)); // of the form and the plan
const telling = (work) => work().catch((error) => tell(error.message));

function time(seconds) {
  if (seconds < 59.5) return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---- the form ----

async function loadForm() {
  const { source } = wish, used = document.activeElement.id, form = await call("/api/form", wish);
  if (source !== wish.source) return;
  fields = form.fields;
  const places = { image: "image", audio: "audio" };
  const missing = fields.filter((field) => own[field.file] && !(field.path in wish.values) && delete places[field.file]);
  if (missing.length) {
    missing.forEach((field) => (wish.values[field.path] = own[field.file]));
    return loadForm();
  }
  $("about").textContent = form.description;
  $("profiles").hidden = !form.profiles.length;
  $("profiles").replaceChildren($("profiles").firstElementChild, ...form.profiles.map((name) => make("label", {}, make("input", {
    type: "checkbox", id: `profile-${name}`, checked: wish.profiles.includes(name), onchange: (event) => {
      wish.profiles = event.target.checked ? [...wish.profiles, name] : wish.profiles.filter((other) => other !== name);
      trying(loadForm);
    } }), name)));
  const first = fields.filter((field) => !field.group || field.file);
  $("fields").replaceChildren(...first.map(fieldOf));
  const groups = [...new Set(fields.filter((field) => !first.includes(field)).map((field) => field.group))];
  $("rest").replaceChildren(...groups.map((group) => make("details", {}, make("summary", {}, group),
    ...fields.filter((field) => field.group === group && !first.includes(field)).map(fieldOf))));
  $("more").hidden = !groups.length;
  $(used)?.focus();
  await plan();
}

function fieldOf(field) {
  const name = field.path.split(".").pop().replaceAll("_", " ");
  if (field.file) return dropOf(field, name);
  const isLong = field.type === "string" && !field.choices.length && (field.value.length > 40 || name.includes("prompt"));
  const value = field.path in wish.values ? wish.values[field.path] : field.value;
  const isNumber = ["integer", "number"].includes(field.type) && value.length < 16;
  const listed = field.choices.length && field.is_free ? make("datalist", { id: `choices-${field.path}` }) : null;
  const choices = field.type === "boolean" ? ["true", "false"] : field.choices;
  listed?.append(...choices.map((choice) => make("option", { value: choice })));
  const input = choices.length && !listed ? make("select", {}, ...choices.map((choice) => make("option", {}, choice)))
    : make(isLong ? "textarea" : "input", isLong ? {} : { type: isNumber ? "number" : "text", data: listed ? { list: listed.id } : {} });
  if (isNumber) Object.assign(input, { min: field.min ?? "", max: field.max ?? "", step: field.step ?? (field.type === "integer" ? 1 : "any") });
  const help = make("small", { id: `help-${field.path}` }, isLong ? "" : field.help);
  input.value = value;
  input.setAttribute("aria-label", field.group ? field.path.replace("nodes.", "") : name);
  input.setAttribute("aria-describedby", help.id);
  const label = make("label", { className: isLong ? "long" : "" }, name, input, help, ...(listed ? [listed] : []));
  input.oninput = () => {
    if (input.value === field.value) delete wish.values[field.path];
    else wish.values[field.path] = input.value;
    label.classList.toggle("changed", field.path in wish.values);
    clearTimeout(timer);
    timer = setTimeout(() => trying(plan), 400);
  };
  return label;
}

function dropOf(field, name) {
  const isImage = field.file === "image", address = `/files/work/${field.at ?? ""}`;
  const shown = !field.at || field.at.startsWith("..") ? make("p", { className: "quiet" }, field.at ? field.value : `${field.value} is not there`)
    : isImage ? make("img", { src: address, alt: `The ${name}: ${field.value}` })
    : make("audio", { src: address, controls: true, preload: "metadata", data: { "aria-label": `The ${name}: ${field.value}` } });
  const input = make("input", { type: "file", id: `file-${field.path}`, accept: isImage ? "image/*" : "audio/*,video/*", onchange: () => trying(() => send([...input.files], field)) });
  return make("div", { className: "drop" }, shown, make("label", {}, isImage ? "Drop a portrait, or choose one" : "Drop a voice, or choose one", input));
}

async function send(files, field) {
  for (const file of files) {
    tell(`Copying ${file.name} …`);
    const { path, kind } = await call(`/api/uploads/${encodeURIComponent(file.name)}`, file, "PUT");
    const what = field?.file ?? (kind === "image" ? "image" : "audio");
    if (kind === "recipe" && !field) choose(path, `the recipe inside ${file.name}`);
    else {
      own[what] = path;
      const target = field ?? fields.find((each) => each.file === what);
      if (target) wish.values[target.path] = path;
      else throw new Error(`this recipe takes no ${what === "image" ? "portrait" : "voice"}`);
    }
    tell(`${file.name} is in ${path}`);
  }
  await loadForm();
}

function choose(source, label) {
  if (![...$("source").options].some((option) => option.value === source)) $("source").prepend(make("option", { value: source }, label));
  $("source").value = source;
  Object.assign(wish, { source, profiles: [], values: {}, name: "" });
  $("name").value = "";
}

// ---- the plan ----

async function plan() {
  const turn = ++planned;
  wish.name = $("name").value;
  const { plan: found, path, command, recipe } = await call("/api/plan", wish);
  if (turn !== planned) return;
  const count = (...names) => found.nodes.filter((node) => names.includes(node.status)).length;
  const parts = [found.seconds === null ? "" : `${found.seconds.toFixed(1)} s of video`, found.chunks ? `${found.chunks} chunks` : "",
    count("RUN", "RESUME") ? `${count("RUN", "RESUME")} to compute` : "nothing to compute", count("HIT") ? `${count("HIT")} stored` : "",
    found.estimate.seconds && count("RUN", "RESUME") ? `about ${time(found.estimate.seconds)}` : ""];
  $("total").textContent = parts.filter(Boolean).join(" · ");
  const missing = found.missing.map((item) => `missing: ${item.file} (${item.kind})${item.homes.length ? `\n  can be had at ${item.homes[0]}` : ""}`);
  $("problem").textContent = missing.join("\n");
  $("run").disabled = missing.length > 0;
  $("notes").replaceChildren(...found.notes.map((note) => make("li", {}, note)));
  $("nodes").replaceChildren(...found.nodes.map((node) => make("tr", {}, make("td", {}, EXPLAINED[node.status] ?? node.status),
    make("td", {}, node.name), make("td", {}, node.reason))));
  $("command").textContent = command;
  $("recipe").textContent = recipe;
  $("name").placeholder = path.split("/").pop().replace(".yaml", "");
}

// ---- the queue ----

function jobOf(job) {
  const since = Date.now(), isSoon = () => job.status === "stopping" && Date.now() - since < 1000; // a double click on Stop means Stop
  const act = (what, label) => make("button", { type: "button", data: { "aria-label": `${label}: ${job.recipe}` },
    onclick: (event) => event.detail < 2 && !isSoon() && telling(() => call(`/api/jobs/${job.id}/${what}`, {})) }, label);
  const isOver = ["finished", "stopped", "failed"].includes(job.status);
  return make("li", {}, make("div", { className: "row" }, make("strong", { className: "grow" }, job.recipe),
    make("span", { className: job.status }, job.seconds !== null && isOver ? `${job.status}, ${time(job.seconds)}` : job.status),
    job.status === "running" ? act("stop", "Stop") : job.status === "stopping" ? act("stop", "Stop at once") : null,
    ["stopped", "failed"].includes(job.status) ? act("resume", "Go on") : null,
    job.status === "finished" ? make("a", { href: `#${job.run}` }, "Watch") : null,
    isOver || job.status === "waiting" ? act("remove", "Remove") : null),
    make("p", { className: "quiet" }, job.error || job.command));
}

function show({ jobs, live, log, is_whole }) {
  const text = JSON.stringify(jobs);
  if (text !== jobsText) {
    jobsText = text;
    const order = ["running", "stopping", "waiting"];
    const active = jobs.filter((job) => order.includes(job.status)), over = jobs.filter((job) => !order.includes(job.status)).reverse();
    renew($("jobs"), [...active, ...over.slice(0, 8)], jobOf);
    $("idle").hidden = jobs.length > 0;
    telling(list);
  }
  $("live").hidden = !live;
  document.title = live ? `${Math.round(live.share * 100)} % · s2vflow` : "s2vflow";
  if (live) {
    $("share").value = live.share;
    const left = live.share > 0.05 ? `, about ${time(live.seconds / live.share - live.seconds)} left` : "";
    $("step").textContent = [live.node, live.step, `${time(live.seconds)}${left}`].filter(Boolean).join(" · ");
    $("preview").hidden = !live.preview;
    if (live.preview) $("preview").src = `/files/runs/${live.preview}?${live.seconds}`;
  }
  if (is_whole || log.some((line) => line.startsWith("$ "))) $("log").textContent = "";
  $("log").append(...log.map((line) => `${line}\n`));
  if (log.length) $("log").scrollTop = $("log").scrollHeight;
}

// ---- the videos ----

async function list() {
  const words = $("search").value;
  const { runs, total, found } = await call(`/api/runs?search=${encodeURIComponent(words)}`);
  if (words !== $("search").value) return;
  $("count").textContent = total ? `${found} of ${total} runs` : "What you make is shown here.";
  shown = runs;
  chosen = chosen.filter((id) => runs.some((run) => run.id === id));
  renew($("gallery"), runs, runOf);
  $("compare").disabled = chosen.length !== 2;
}

const nameOf = (run) => run.outputs[0]?.split("/").pop() ?? run.recipe;

function runOf(run) {
  const { image, audio, prompt, negative_prompt, ...numbers } = run.params;
  const changes = run.changes.slice(0, 3).map((item) => `${item.name.replace(/^params\./, "")} ${item.a} → ${item.b}`).join(", ");
  const name = nameOf(run);
  const pick = make("input", { type: "checkbox", checked: chosen.includes(run.id), onchange: () => {
    chosen = pick.checked ? [...chosen, run.id] : chosen.filter((id) => id !== run.id);
    $("compare").disabled = chosen.length !== 2;
  } });
  const report = make("button", { type: "button", data: { "aria-label": `Report of ${name}` }, onclick: () => telling(async () => {
    tell("Making the report …");
    const made = await call(`/api/runs/${run.id}/report`, {});
    report.replaceWith(make("a", { href: made.report, target: "_blank", className: "button" }, "Open the report"));
  }) }, "Report");
  const again = make("button", { type: "button", data: { "aria-label": `Use the settings of ${name}` }, onclick: () => trying(() => reuse(run)) }, "Use again");
  return make("article", { id: run.id }, run.videos.length ? make("video", { src: run.videos[0], controls: true, preload: "metadata", loop: true,
    data: { "aria-label": `${name}, run ${run.id}` } }) : null,
    make("h3", {}, name), make("p", { className: "quiet" }, make("span", { className: run.status }, run.status),
      ` · ${new Date(run.started).toLocaleString()}${run.seconds === null ? "" : ` · ${time(run.seconds)}`}`),
    make("p", { className: "quiet" }, run.error || changes || Object.entries(numbers).map(([key, value]) => `${key} ${value}`).join(", ")),
    make("div", { className: "row" }, make("label", { className: "grow" }, pick, "Compare"), again,
      run.videos.length ? report : null));
}

async function reuse(run) {
  choose(run.recipe, run.recipe);
  await loadForm();
  const known = Object.fromEntries(fields.map((field) => [field.path, field.value]));
  for (const [key, value] of Object.entries(run.params)) {
    const path = `params.${key}`, text = typeof value === "string" ? value : JSON.stringify(value);
    if (path in known && !["image", "audio"].includes(key) && known[path] !== text && Number(known[path]) !== Number(text)) wish.values[path] = text;
  }
  await loadForm();
  $("make").scrollIntoView();
}

async function compare() {
  const [a, b] = chosen, sides = chosen.map((id) => shown.find((run) => run.id === id));
  $("sides").replaceChildren(...sides.map((run, index) => make("figure", {}, make("figcaption", {}, `${"AB"[index]}: ${nameOf(run)}, run ${run.id}`),
    run.videos.length ? make("video", { src: run.videos[0], muted: index > 0, preload: "auto", data: { "aria-label": `Video ${"AB"[index]}` } })
      : make("p", {}, "It has no video."))));
  $("differences").replaceChildren(make("p", {}, "Comparing …"));
  $("pair").showModal();
  const found = await call(`/api/compare?a=${a}&b=${b}`);
  const row = (cell, ...texts) => make("tr", {}, ...texts.map((text) => make(cell, {}, text)));
  const said = (value) => (value === null ? "nothing" : value.name ?? String(value));
  $("differences").replaceChildren(make("table", {}, row("th", "What differs", "A", "B"),
    ...found.differences.map((item) => row("td", item.name, said(item.a), said(item.b)))),
    make("pre", { tabIndex: 0 }, found.text.split("\n").filter((line) => !/^(a|b|params|nodes|models|inputs|environment): /.test(line)).join("\n")));
}

function playBoth() {
  const videos = [...$("sides").querySelectorAll("video")];
  const isPlaying = videos.some((video) => !video.paused);
  videos.forEach((video) => (isPlaying ? video.pause() : video.play().catch(() => {})));
  $("both").textContent = isPlaying ? "Play both" : "Pause both";
  if (videos[0]) videos[0].ontimeupdate = () => ($("time").value = videos[0].currentTime / videos[0].duration || 0);
}

// One tab listens for all: a browser opens six connections to a server, and a stream of events keeps one.
function listen() {
  const tabs = new BroadcastChannel("s2vflow");
  let events = null;
  const open = () => {
    events?.close();
    events = new EventSource("/api/events");
    events.onmessage = ({ data }) => { show(JSON.parse(data)); tabs.postMessage(data); };
    events.onerror = () => tell("The server does not answer. Is s2vflow ui still running?");
  };
  tabs.onmessage = ({ data }) => (data !== "new tab" ? show(JSON.parse(data)) : events && open()); // it begins with the whole state
  navigator.locks.request("s2vflow", () => { open(); return new Promise(() => {}); });
  tabs.postMessage("new tab");
}

// ---- the start ----

if (location.search) history.replaceState(null, "", "/");
$("source").onchange = () => { choose($("source").value); trying(loadForm); };
$("name").oninput = () => { clearTimeout(timer); timer = setTimeout(() => trying(plan), 400); };
$("form").onsubmit = (event) => event.preventDefault();
$("run").onclick = (event) => event.detail < 2 && trying(async () => { wish.name = $("name").value; tell(`${(await call("/api/jobs", wish)).command} waits or runs`); await plan(); });
$("search").oninput = () => telling(list);
$("compare").onclick = () => telling(compare);
$("close").onclick = () => $("pair").close();
$("pair").onclose = () => $("sides").replaceChildren();
$("both").onclick = playBoth;
$("time").oninput = () => $("sides").querySelectorAll("video").forEach((video) => { if (video.duration) video.currentTime = $("time").value * video.duration; });
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); trying(() => send([...event.dataTransfer.files])); });
trying(async () => {
  const { folder, recipes } = await call("/api/recipes");
  Object.assign($("folder"), { textContent: folder.split("/").pop(), title: folder });
  const group = (label, found) => make("optgroup", { label }, ...found.map(({ source }) => make("option", { value: source }, source.replace("start:", ""))));
  const [starts, files] = [true, false].map((isStart) => recipes.filter(({ source }) => source.startsWith("start:") === isStart));
  $("source").append(...[files.length ? group("In this folder", files) : null, group("New, for a portrait and a voice", starts)].filter(Boolean));
  choose(recipes.find(({ source }) => source.endsWith("demo.yaml"))?.source ?? recipes[0].source);
  listen();
  await loadForm();
});
