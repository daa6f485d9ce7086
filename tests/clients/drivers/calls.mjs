// What a driver prints: a JSON line a call; as calls.py.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

export const stage = JSON.parse(process.env.STAGE);

/** Import a package of this client's environment. */
export function load(name) {
  return import(pathToFileURL(createRequire(`${process.env.ENVIRONMENT}/`).resolve(name)));
}

function print(call, ok, note) {
  console.log(JSON.stringify({ client: stage.client, call, ok, note: String(note).slice(0, 300) }));
}

export function assert(holds, what) {
  if (!holds) throw new Error(`expected ${what}`);
}

/** A call that must work: what the function asserts is part of it. Returns what the function returns. */
export async function works(call, act, note = '') {
  try {
    const value = await act();
    print(call, true, note);
    return value;
  } catch (error) {
    console.error(error);
    print(call, false, `${error?.name}: ${error?.message}`);
    return undefined;
  }
}

/** A call whose error the client must recognise: its fields, and parts of its text. */
export async function raises(call, fields, texts, act) {
  try {
    await act();
  } catch (error) {
    const wrong = Object.entries(fields).filter(([name, value]) => error[name] !== value);
    const missing = texts.filter((text) => !String(error.message).includes(text));
    const told = [...Object.entries(fields).map(([name, value]) => `${name}=${value}`), ...texts].join('; ');
    if (wrong.length || missing.length) {
      console.error(error);
      print(call, false, `wanted ${told}; got ${error?.name}: ${error?.message}`);
    } else print(call, true, `${error.constructor.name}: ${told}`);
    return;
  }
  print(call, false, 'raised nothing');
}

/** A call that the client itself does not do, whatever the server is. */
export async function clientRefuses(call, text, act) {
  try {
    await act();
  } catch (error) {
    const fine = String(error.message).includes(text);
    print(call, fine ? null : false, fine ? `the client refuses: ${text}` : error.message);
    return;
  }
  print(call, false, 'the client does this now: move it among the calls that work');
}
