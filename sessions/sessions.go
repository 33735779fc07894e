// Package sessions keeps what a client's session owns beyond its connection: its
// subscriptions, the messages queued for it and its will, and the broker's retained
// messages.
//
// It is the place for durable sessions in the layout and holds no code yet: sessions
// and retained messages live in memory, inside mochi-mqtt, and end with the process.
package sessions
