(() => {
  "use strict";
  // A latent is [number, density, captured pairs, pairs, contexts], a context [strength, before, token, after],
  // a pair [latent, latent, cosine, strength, captured].
  const saes = JSON.parse(document.getElementById("browser-data").textContent);
  const get = (name) => document.getElementById("browser-" + name);
  const fields = ["sae", "what", "latent", "least", "most", "text"];
  let entries = [], chosen = 0;

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const percent = (share) => `${Number((100 * share).toPrecision(2))}%`;
  const says = (latent, text) => !text || latent[4].some((one) => one.slice(1).join("").toLowerCase().includes(text));
  const matches = (latent, wanted) =>
    (wanted.least === "" || 100 * latent[1] >= Number(wanted.least)) &&
    (wanted.most === "" || 100 * latent[1] <= Number(wanted.most)) && says(latent, wanted.text);

  function found() {
    const wanted = Object.fromEntries(fields.map((name) => [name, get(name).value.trim().toLowerCase()]));
    const sae = saes[Number(wanted.sae)], byNumber = new Map(sae.latents.map((latent) => [latent[0], latent]));
    if (wanted.what === "latents")
      return sae.latents
        .filter((latent) => (wanted.latent === "" || String(latent[0]).startsWith(wanted.latent)) && matches(latent, wanted))
        .map((latent) => ({ title: `Latent ${latent[0]}`, note: percent(latent[1]), latents: [latent] }));
    return sae.pairs
      .filter((pair) => (pair[4] === 1) === (wanted.what === "captured"))
      .filter((pair) => wanted.latent === "" || pair.slice(0, 2).some((one) => String(one) === wanted.latent))
      .map((pair) => ({ pair, latents: [byNumber.get(pair[0]), byNumber.get(pair[1])] }))
      .filter((entry) => entry.latents.some((latent) => matches(latent, wanted)))
      .map((entry) => ({ ...entry, title: `${entry.pair[0]} and ${entry.pair[1]}`, note: `cosine ${entry.pair[2].toFixed(2)}` }));
  }

  function card(latent) {
    const box = make("article"), strongest = latent[4].length ? latent[4][0][0] || 1 : 1;
    box.append(make("h3", `Latent ${latent[0]}`));
    const pairs = latent[3] ? `; ${latent[2]} of its ${latent[3]} strongest pairs captured` : "";
    box.append(make("p", `fires on ${percent(latent[1])} of tokens${pairs}`, "rate"));
    const list = make("ol", undefined, "contexts");
    for (const [strength, before, token, after] of latent[4]) {
      const line = make("li"), bar = make("span", String(strength), "strength"), text = make("span", undefined, "text");
      bar.style.setProperty("--share", (strength / strongest).toFixed(3));
      text.dir = "auto";
      text.append(make("bdi", before), make("mark", token), make("bdi", after));
      line.append(bar, text);
      list.append(line);
    }
    box.append(list);
    return box;
  }

  function choose(number) {
    chosen = Math.max(0, Math.min(number, entries.length - 1));
    const list = get("list"), shown = get("shown"), entry = entries[chosen];
    [...list.children].forEach((item, index) => item.setAttribute("aria-selected", String(index === chosen)));
    shown.replaceChildren();
    if (!entry) return list.removeAttribute("aria-activedescendant");
    list.setAttribute("aria-activedescendant", `browser-${chosen}`);
    const item = list.children[chosen];
    if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
    const below = item.offsetTop + item.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
    shown.className = entry.pair ? "pair" : "";
    shown.append(...entry.latents.map(card));
  }

  function refresh() {
    entries = found();
    get("list").replaceChildren(...entries.map((entry, index) => {
      const item = make("li");
      item.id = `browser-${index}`;
      item.setAttribute("role", "option");
      item.append(make("span", entry.title), make("span", entry.note, "rate"));
      item.addEventListener("click", () => choose(index));
      return item;
    }));
    get("list").scrollTop = 0;
    const what = get("what").value === "latents" ? "latent" : "pair";
    get("count").textContent = entries.length === 1 ? `1 ${what}` : `${entries.length || "no"} ${what}s`;
    choose(0);
  }

  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  get("list").addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(chosen + moves[event.key]);
  });
  get("sae").append(...saes.map((sae, index) => new Option(sae.name, index)));
  for (const name of fields) get(name).addEventListener("input", refresh);
  document.getElementById("browser").hidden = false;
  refresh();
})();
