// The page of a run: follows the coordinator's events and shows them. Everything is put in as text.

import { Chart, bytes, figure, noisy } from "./charts.js";

const LOST_S = 12; // the coordinator says something every 5 s
const POLL_AFTER_S = 6; // events that do not come: a proxy may hold them back, so ask instead
const TABLE_S = 2;
const COLUMNS = [
  ["name", "name"], ["state", "state"], ["seen_s", "last seen"], ["answer_s", "answer took"],
  ["contributions", "contributions"], ["rejected", "rejected"], ["received", "received"], ["sent", "sent"],
];
const COLOURS = ["--accent", "--second", "--third", "--fourth"];
const WORDS = { failed: "ledger cannot be written", lost: "connection lost" };
const COUNT = new Intl.NumberFormat("en");

const at = (id) => document.getElementById(id);
const put = (id, text) => { const place = at(id); if (place.textContent !== text) place.textContent = text; };
const plural = (count, word) => `${COUNT.format(count)} ${word}${count === 1 ? "" : "s"}`;
const ago = (seconds) => seconds === null ? "–" : seconds < 90 ? `${seconds.toFixed(0)} s ago` : seconds < 5400 ? `${(seconds / 60).toFixed(0)} min ago` : `${(seconds / 3600).toFixed(0)} h ago`;
// Reasons begin with a word, but for addresses.
const sentence = (text) => (/^[a-z]+:? /.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text) + (/[.!?]$/.test(text) ? "" : ".");
const whole = (value) => Number.isInteger(value) ? COUNT.format(value) : "";

const charts = { loss: new Chart("loss-chart"), accuracy: new Chart("accuracy-chart"), signal: new Chart("signal-chart") };
const table = { page: 0, order: "worker", descending: false, asked: 0 };
let status = null;
let curves = null;
let heard = performance.now();
let began = performance.now();
let byEvents = false;
let lost = false;

// -- status ---------------------------------------------------------------------------------------

function setState(name) {
  if (document.body.dataset.state === name) return;
  document.body.dataset.state = name;
  put("state", WORDS[name] ?? name);
}

function showStatus(now) {
  status = now;
  heardOf();
  setState(now.state);
  put("run", now.run);
  put("about", `${now.model}, ${now.estimator}, a quorum of ${now.quorum}`);
  put("reason", sentence(now.reason));
  document.querySelector("main").hidden = now.state === "standing by";
  at("progress").hidden = now.state === "standing by";
  if (now.state === "standing by") {
    put("progress-text", "");
    document.title = `${now.run}: standing by`;
    return;
  }
  document.title = `${now.committed}/${now.rounds} ${now.run}: ${WORDS[now.state] ?? now.state}`;
  at("progress").max = now.rounds;
  at("progress").value = now.committed;
  put("progress-text", `${COUNT.format(now.committed)} of ${plural(now.rounds, "round")} committed`);
  const failed = now.state === "failed";
  at("notice").hidden = !failed;
  if (failed) put("notice", "Nothing is lost: the round is kept and tried again. Free space or repair the ledger's disk or database; the run then goes on by itself.");
  showTiles(now);
  showFindings(now.findings);
  showPrivacy(now.privacy);
  put("entries", COUNT.format(now.entries));
  put("abandoned", COUNT.format(now.abandoned));
  put("head", now.head);
  put("key", now.key ?? "nobody");
  put("traffic", `${bytes(now.bytes.received)}, ${bytes(now.bytes.sent)} since the coordinator started`);
  put("rejected", COUNT.format(now.rejected));
}

function showTiles(now) {
  const who = now.workers;
  put("loss", figure(now.loss));
  put("loss-note", now.telemetry ? "of the last round" : "not reported in this run");
  put("accuracy", now.accuracy === null ? "–" : `${(100 * now.accuracy).toFixed(1)} %`);
  put("accuracy-note", now.accuracy === null ? "not evaluated yet" : "held-out, newest");
  put("signal", now.signal ? now.signal[0].toFixed(2) : "–");
  put("signal-note", now.signal ? `± ${now.signal[1].toFixed(2)}` : "needs two participants");
  put("connected", COUNT.format(who.connected));
  put("connected-note", `connected of ${COUNT.format(who.known)}` + (who.quarantined ? `, ${who.quarantined} apart` : ""));
  put("codes", bytes(now.bytes.codes));
  put("workers-note", who.participants ? `${COUNT.format(who.answered)} of ${COUNT.format(who.participants)} answered round ${now.round}` : "");
}

function showFindings(findings) {
  at("findings").hidden = findings.length === 0;
  at("findings-list").replaceChildren(...findings.map(({ text, warning }) => {
    const item = document.createElement("li");
    item.className = warning ? "warning" : "";
    item.textContent = warning ? `Warning: ${text}` : text;
    return item;
  }));
}

function showPrivacy(budget) {
  at("privacy").hidden = budget === null;
  if (budget === null) return;
  const adds = { worker: "each worker adds the noise", central: "the coordinator adds the noise", "secure-sum": "all add shares of the noise, and only the sum is seen" }[budget.mode];
  const known = budget.epsilon !== null;
  at("budget").max = known ? budget.target_epsilon : budget.releases;
  at("budget").value = known ? budget.epsilon : budget.rounds;
  const spent = known ? `At most ε = ${budget.epsilon.toFixed(2)} of ${budget.target_epsilon} is spent` : `The whole run spends ε = ${budget.target_epsilon}`;
  put("budget-text", `${spent} (δ = ${budget.delta}), after ${budget.rounds} of ${plural(budget.releases, "release")}; ${adds}.`);
}

// -- curves ---------------------------------------------------------------------------------------

function ends(label, x, values) {
  const known = values.map((value, i) => [x[i], value]).filter(([, value]) => value !== null);
  if (!known.length) return "";
  const [first, last] = [known[0], known[known.length - 1]];
  return `${label}: ${figure(first[1])} after round ${first[0]}, ${figure(last[1])} after round ${last[0]}.`;
}

function showCurves(now) {
  curves = now;
  heardOf();
  const { rounds, evaluations } = now;
  const byBytes = document.querySelector("input[name=against]:checked").value === "bytes";
  const none = rounds.committed.length === 0 ? "No round is committed yet." : "";
  const has = (values) => values.some((value) => value !== null);
  charts.loss.show({
    x: byBytes ? rounds.bytes : rounds.committed,
    xLabel: byBytes ? "codes exchanged" : "round",
    format: byBytes ? bytes : whole,
    series: noisy(rounds.loss),
    summary: ends("Loss", rounds.committed, rounds.loss),
    empty: none || (has(rounds.loss) ? "" : "Workers report no loss in this run."),
  });
  charts.signal.show({
    x: rounds.committed, xLabel: "round", format: whole,
    series: noisy(rounds.signal),
    summary: ends("Signal-to-noise", rounds.committed, rounds.signal),
    empty: none || (has(rounds.signal) ? "" : "It takes two participants that measure the same directions."),
  });
  showEvaluations(evaluations);
}

// Evaluators have rounds of their own: one column of rounds, and gaps where somebody did not measure.
function showEvaluations(evaluations) {
  const x = [...new Set(evaluations.flatMap((each) => each.committed))].sort((one, two) => one - two);
  const series = evaluations.slice(0, COLOURS.length).map((each, i) => {
    const found = new Map(each.committed.map((round, j) => [round, each.accuracy[j]]));
    return { label: each.evaluator, values: x.map((round) => found.get(round) ?? null), colour: COLOURS[i] };
  });
  charts.accuracy.show({
    x, xLabel: "round", format: whole, series,
    summary: series.map((each) => ends(`Accuracy, ${each.label}`, x, each.values)).join(" "),
    empty: x.length ? "" : "Nobody evaluated yet: lr-worker evaluate HOST:PORT --data FILE --follow",
  });
}

// -- participants ---------------------------------------------------------------------------------

function heads() {
  at("heads").replaceChildren(...COLUMNS.map(([key, label]) => {
    const head = document.createElement("th");
    head.scope = "col";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", () => {
      table.descending = table.order === key ? !table.descending : !["name", "state"].includes(key);
      table.order = key;
      table.page = 0;
      sortMarks();
      askTable();
    });
    head.append(button);
    return head;
  }));
}

function sortMarks() {
  [...at("heads").children].forEach((head, i) => {
    if (COLUMNS[i][0] === table.order) head.setAttribute("aria-sort", table.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function cells(row) {
  return [
    row.name, row.state, row.state === "away" || row.seen_s >= 15 ? ago(row.seen_s) : "now",
    row.answer_s === null ? "–" : `${row.answer_s < 10 ? row.answer_s.toFixed(2) : row.answer_s.toFixed(0)} s`,
    COUNT.format(row.contributions), COUNT.format(row.rejected), bytes(row.received), bytes(row.sent),
  ];
}

function showTable(now) {
  at("nobody").hidden = now.known !== 0;
  at("table").hidden = now.known === 0;
  table.page = now.page;
  const rows = at("rows");
  while (rows.children.length > now.rows.length) rows.lastChild.remove();
  now.rows.forEach((row, i) => {
    const line = rows.children[i] ?? rows.appendChild(document.createElement("tr"));
    cells(row).forEach((text, j) => {
      const cell = line.children[j] ?? line.appendChild(document.createElement(j ? "td" : "th"));
      if (j === 0) { cell.scope = "row"; cell.title = `worker ${row.worker}: ${row.name}`; }
      if (j === 1) { cell.className = "state"; cell.dataset.state = row.state; }
      if (cell.textContent !== text) cell.textContent = text;
    });
  });
  at("pages").hidden = now.pages === 1;
  at("before").disabled = now.page === 0;
  at("after").disabled = now.page === now.pages - 1;
  put("where", `page ${now.page + 1} of ${now.pages}`);
}

async function askTable() {
  const number = ++table.asked;
  const query = `page=${table.page}&order=${table.order}&descending=${table.descending ? 1 : 0}`;
  const answer = await ask(`workers.json?${query}`);
  if (answer && number === table.asked) showTable(answer); // an answer to an older question is dropped
}

// -- connection -----------------------------------------------------------------------------------

async function ask(path) {
  try {
    const answer = await fetch(path, { signal: AbortSignal.timeout(5000) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

function heardOf() {
  heard = performance.now();
  if (!lost) return;
  lost = false;
  at("notice").hidden = true;
}

function lose() {
  if (lost) return;
  lost = true;
  const since = new Date().toLocaleTimeString();
  setState("lost");
  at("notice").hidden = false;
  put("notice", `The coordinator does not answer since ${since}: it was stopped, or the network is down. Figures are from then; this page goes on by itself.`);
}

function follow() {
  const source = new EventSource("events");
  const on = (kind, show) => source.addEventListener(kind, (event) => { byEvents = true; show(JSON.parse(event.data)); });
  on("status", showStatus);
  on("curves", showCurves);
  on("alive", () => { heardOf(); if (status) setState(status.state); });
  source.addEventListener("error", () => {
    lose();
    if (source.readyState !== EventSource.CLOSED) return;
    source.close(); // the browser gave up; we do not
    setTimeout(follow, 3000);
  });
}

async function poll() {
  const [now, drawn] = await Promise.all([ask("status.json"), ask("curves.json")]);
  if (now) showStatus(now);
  if (drawn) showCurves(drawn);
}

let seconds = 0;
function tick() {
  seconds += 1;
  const silence = (performance.now() - heard) / 1000;
  if (silence > LOST_S) lose();
  if (document.hidden) return;
  if (!byEvents && performance.now() - began > 1000 * POLL_AFTER_S && seconds % TABLE_S === 0) poll();
  if (seconds % TABLE_S === 0 && !lost && status && status.state !== "standing by") askTable();
}

heads();
at("before").addEventListener("click", () => { table.page -= 1; askTable(); });
at("after").addEventListener("click", () => { table.page += 1; askTable(); });
document.querySelectorAll("input[name=against]").forEach((input) => input.addEventListener("change", () => { if (curves) showCurves(curves); }));
follow();
askTable();
setInterval(tick, 1000);
