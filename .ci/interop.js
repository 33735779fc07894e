// MQTT.js, which assigns topic aliases by itself; and its sessions. .ci/interop runs this; the argument is the
// broker's port on 127.0.0.1.
'use strict'
const assert = require('node:assert/strict')
const mqtt = require('mqtt')

const url = `mqtt://127.0.0.1:${process.argv[2]}`
const patience = 15000
let step = 'start'

function failed (e) {
  console.log(`interop: MQTT.js: ${step}: ${e.message}`)
  process.exit(1)
}
process.on('uncaughtException', failed)
process.on('unhandledRejection', failed)
setTimeout(() => failed(new Error(`not done in ${patience} ms`)), patience)

// client is connected; what comes for it is in its field got.
async function client (clientId, options) {
  step = `${clientId} connects`
  const c = mqtt.connect(url, { clientId, reconnectPeriod: 0, ...options })
  c.got = []
  c.on('message', (topic, payload, packet) => c.got.push({ topic, payload: `${payload}`, qos: packet.qos, dup: packet.dup }))
  c.on('disconnect', (packet) => failed(new Error(`DISCONNECT ${packet.reasonCode}`)))
  c.on('close', () => { if (!c.disconnecting) failed(new Error(`the connection of ${clientId} was closed`)) })
  const connack = await new Promise((resolve, reject) => c.once('connect', resolve).once('error', reject))
  c.present = connack.sessionPresent
  return c
}

// until waits for a message with the payload, and returns those before it.
async function until (c, last) {
  let i
  while ((i = c.got.findIndex((m) => m.payload === last)) < 0) await new Promise((resolve) => setTimeout(resolve, 5))
  return c.got.splice(0, i + 1).slice(0, i)
}

async function aliases () {
  const topics = 8 // fewer than the broker lets clients set: each alias is used again
  const subscribers = [await client('js-sub-v4', { protocolVersion: 4 }), await client('js-sub-v5', { protocolVersion: 5 })]
  for (const s of subscribers) await s.subscribeAsync('js/#', { qos: 2 })
  const publisher = await client('js-pub', { protocolVersion: 5, autoAssignTopicAlias: true })
  let byAlias = 0
  publisher.on('packetsend', (p) => { if (p.cmd === 'publish' && p.topic === '') byAlias++ })
  step = 'publishing by topic alias'
  const sent = []
  for (let i = 0; i < 120; i++) {
    const m = { topic: `js/${i % topics}`, payload: `${i}`, qos: i % 3 }
    sent.push(`${m.qos} ${m.topic} ${m.payload}`)
    await publisher.publishAsync(m.topic, m.payload, { qos: m.qos })
  }
  await publisher.publishAsync('js/end', 'end', { qos: 2 })
  assert.ok(byAlias >= 120 - topics, `${byAlias} of 120 publishes had an alias for a topic`)
  for (const s of subscribers) {
    step = `${s.options.clientId} gets what was published by topic alias`
    const got = (await until(s, 'end')).map((m) => `${m.qos} ${m.topic} ${m.payload}`)
    for (const qos of ['0', '1', '2']) { // those of QoS 2 come with their PUBREL: the order is to be seen within a QoS
      assert.deepEqual(got.filter((m) => m[0] === qos), sent.filter((m) => m[0] === qos))
    }
    await s.endAsync()
  }
  await publisher.endAsync()
}

async function sessions () {
  const publisher = await client('js-pub', { protocolVersion: 4 })
  for (const [version, properties] of [[4, undefined], [5, { sessionExpiryInterval: 300 }]]) {
    const options = { protocolVersion: version, clean: false, properties }
    let c = await client(`js-session-v${version}`, options)
    await c.subscribeAsync('session/#', { qos: 2 })
    await c.endAsync()
    const sent = []
    for (let i = 0; i < 100; i++) {
      await publisher.publishAsync('session/x', `${i}`, { qos: 1 + i % 2 })
      sent.push({ topic: 'session/x', payload: `${i}`, qos: 1 + i % 2, dup: false })
    }
    await publisher.publishAsync('session/x', 'end', { qos: 2 })
    c = await client(`js-session-v${version}`, options)
    step = `${c.options.clientId} gets what was queued`
    assert.equal(c.present, true, 'session present')
    const got = await until(c, 'end')
    for (const qos of [1, 2]) assert.deepEqual(got.filter((m) => m.qos === qos), sent.filter((m) => m.qos === qos))
    await c.unsubscribeAsync('session/#')
    await c.endAsync()
  }
  await publisher.endAsync()
}

async function main () {
  await aliases()
  await sessions()
  console.log('interop: MQTT.js: topic aliases, sessions')
}
main().then(() => process.exit(0), failed)
