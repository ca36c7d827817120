// What was added to a run that still goes.

// Curves are redrawn in place; new texts wait for a click, so that nothing moves under the reader's eyes.
async function poll() {
  const run = DATA.runs[0],
    live = DATA.live;
  try {
    const asked = Object.entries(live.have)
      .map(([name, [generation, n]]) => `${name}=${generation}.${n}`)
      .join("&");
    const response = await fetch(`data?${asked}`, { signal: AbortSignal.timeout(20000), cache: "no-store" });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const found = await response.json();
    let moved = false,
      fresh = 0;
    for (const [name, part] of Object.entries(found.parts)) {
      const old = name === "samples" ? run.samples : run.metrics[name];
      const rows = part.again ? part.rows : [...old, ...part.rows];
      if (name === "samples") [run.samples, fresh] = [rows, rows.length - old.length || Number(part.again)];
      else {
        run.metrics[name] = rows;
        moved ||= part.again || part.rows.length > 0;
      }
      live.have[name] = [part.generation, part.total];
    }
    run.left = found.left;
    if (moved) redraw();
    if (fresh && $("rows").childElementCount) {
      $("fresh").textContent = "New texts were recorded: show them";
      $("fresh").hidden = false;
    } else if (fresh) {
      fillSteps();
      list();
    }
    say(
      found.said + (found.stamp !== live.stamp ? " New results are there: reload the page to see them." : ""),
      false,
    );
  } catch (error) {
    say(`The server does not answer (${error.message}); this is what it last sent. Asking again.`, true);
  }
  setTimeout(poll, live.every * 1000);
}

function say(sentence, lost) {
  $("live").hidden = false;
  $("live").classList.toggle("lost", lost);
  if ($("live").textContent !== sentence) $("live").textContent = sentence;
}

if (DATA.facts) whyView(DATA.facts);
curves();
browser();
if (DATA.live) {
  say(DATA.live.said, false);
  setTimeout(poll, DATA.live.every * 1000);
}
