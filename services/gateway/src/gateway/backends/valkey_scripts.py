"""The rules of core.counts as scripts that Valkey runs alone, one at a time, with its own clock.

A limit is kept under its name: a hash of used, at, held and, for each request that holds something, its amount; beside
it `<name>:held`, the requests that hold something by the time until which they are believed to live, and
`<name>:log`, the entries of a sliding log. All three carry the tenant's hash tag and leave together, when nothing
of them can matter any more. A request that dies with its gateway has used all that it held: nobody can say less.
"""

_CLOCK = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

# Args of a meter: algorithm, amount, window, counted.
_METERS = """
local LEAKY_WAIT, HELD_RETRY = 5000, 1000

local function text(number) return string.format('%.0f', number) end

local function add(m, amount, id)
    if m.algorithm == 'fixed_window' then
        if m.at == 0 then m.at = now + m.window end
        m.used = m.used + amount
    elseif m.algorithm == 'sliding_log' then
        if amount > 0 then
            redis.call('ZADD', m.name .. ':log', now, id .. ':' .. text(amount))
            m.used = m.used + amount
        end
    elseif m.algorithm ~= 'concurrency' then
        m.used = m.used + amount * m.window
    end
end

local function advance(m)
    if m.algorithm == 'fixed_window' then
        if m.at <= now or m.at > now + m.window then m.used, m.at = 0, 0 end
    elseif m.algorithm == 'sliding_log' then
        local log, old = m.name .. ':log', text(now - m.window)
        for _, entry in ipairs(redis.call('ZRANGEBYSCORE', log, '-inf', old)) do
            m.used = m.used - tonumber(string.match(entry, ':(%d+)$'))
        end
        redis.call('ZREMRANGEBYSCORE', log, '-inf', old)
    elseif m.algorithm ~= 'concurrency' then
        m.used, m.at = math.max(0, m.used - math.max(0, now - m.at) * m.amount), now
    end
end

-- Gives back what a request holds; false where it holds nothing (any more).
local function release(m, id)
    if redis.call('ZREM', m.name .. ':held', id) == 0 then return false end
    local amount = tonumber(redis.call('HGET', m.name, 'h:' .. id)) or 0
    redis.call('HDEL', m.name, 'h:' .. id)
    m.held = math.max(0, m.held - amount)
    return amount
end

local function open(name, first)
    local m = {name = name, algorithm = ARGV[first], amount = tonumber(ARGV[first + 1]),
        window = tonumber(ARGV[first + 2]), counted = ARGV[first + 3]}
    local kept = redis.call('HMGET', name, 'used', 'at', 'held')
    m.used, m.at, m.held = tonumber(kept[1]) or 0, tonumber(kept[2]) or 0, tonumber(kept[3]) or 0
    advance(m)
    if m.held > 0 then
        -- Only where Valkey evicted it under memory pressure; what nobody can give back must not stay held.
        if redis.call('EXISTS', name .. ':held') == 0 then m.held = 0 end
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', name .. ':held', '-inf', now)) do
            add(m, release(m, id), id)
        end
    end
    return m
end

local function wait(m, held)
    return m.algorithm == 'leaky_bucket' and math.ceil((m.used + held * m.window) / m.amount) or 0
end

local function room(m, held)
    if m.algorithm == 'token_bucket' then
        return math.floor((m.amount * m.window - m.used) / m.window) - held
    elseif m.algorithm == 'leaky_bucket' then
        return wait(m, held) <= math.min(LEAKY_WAIT, m.window) and m.amount or 0
    end
    return m.amount - m.used - held
end

local function remaining(m)
    if m.algorithm == 'leaky_bucket' then
        local free = math.min(LEAKY_WAIT, m.window) * m.amount - m.used - m.held * m.window
        return math.min(m.amount, math.floor(free / m.window) + 1)
    end
    return room(m, m.held)
end

local function reset(m)
    if m.algorithm == 'fixed_window' then
        return m.at > 0 and m.at - now or 0
    elseif m.algorithm == 'sliding_log' then
        local newest = redis.call('ZRANGE', m.name .. ':log', -1, -1, 'WITHSCORES')
        return newest[2] and tonumber(newest[2]) + m.window - now or 0
    elseif m.algorithm == 'concurrency' then
        return 0
    end
    return math.ceil(m.used / m.amount)
end

local function retry(m, cost)
    if cost <= room(m, 0) then
        return HELD_RETRY
    elseif m.algorithm == 'fixed_window' then
        return reset(m)
    elseif m.algorithm == 'sliding_log' then
        local missing, first = cost - room(m, m.held), 0
        while true do
            local entries = redis.call('ZRANGE', m.name .. ':log', first, first + 99, 'WITHSCORES')
            if #entries == 0 then return HELD_RETRY end
            for i = 1, #entries, 2 do
                missing = missing - tonumber(string.match(entries[i], ':(%d+)$'))
                if missing <= 0 then return tonumber(entries[i + 1]) + m.window - now end
            end
            first = first + 100
        end
    elseif m.algorithm == 'token_bucket' then
        return math.ceil((m.used + (m.held + cost - m.amount) * m.window) / m.amount)
    elseif m.algorithm == 'leaky_bucket' then
        return wait(m, m.held) - math.min(LEAKY_WAIT, m.window)
    end
    return HELD_RETRY
end

local function save(m, lease)
    redis.call('HSET', m.name, 'used', text(m.used), 'at', text(m.at), 'held', text(m.held))
    local life = m.window + 1000
    if m.counted ~= 'requests' then
        life = math.max(life, lease + 1000)
        redis.call('PEXPIRE', m.name .. ':held', life)
    end
    if m.algorithm == 'sliding_log' then redis.call('PEXPIRE', m.name .. ':log', life) end
    redis.call('PEXPIRE', m.name, life)
end
"""

# KEYS: the meters. ARGV: request, lease, least and most tokens, then the meters' args.
# Answers allowed, tokens, wait, then remaining, reset and retry of each meter; times in milliseconds.
_RESERVE = """
local id, lease, least, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local meters, tokens = {}, most
for i, name in ipairs(KEYS) do
    local m = open(name, 1 + 4 * i)
    m.room = room(m, m.held)
    if m.counted == 'tokens' then tokens = math.min(tokens, m.room) end
    meters[i] = m
end
tokens = math.max(tokens, least)
local allowed, longest = 1, 0
for _, m in ipairs(meters) do
    m.cost = m.counted == 'tokens' and tokens or 1
    m.retry = 0
    if m.cost > m.room then m.retry, allowed = math.max(1, retry(m, m.cost)), 0 end
end
for _, m in ipairs(meters) do
    if allowed == 1 then
        longest = math.max(longest, wait(m, m.held))
        if m.counted == 'requests' then
            add(m, 1, id)
        else
            redis.call('ZADD', m.name .. ':held', now + lease, id)
            redis.call('HSET', m.name, 'h:' .. id, text(m.cost))
            m.held = m.held + m.cost
            add(m, 0, id)
        end
    end
    save(m, lease)
end
local answer = {allowed, tokens, longest}
for _, m in ipairs(meters) do
    table.insert(answer, math.max(0, remaining(m)))
    table.insert(answer, reset(m))
    table.insert(answer, m.retry)
end
return answer
"""

# KEYS: the meters. ARGV: request, lease, the tokens that it has used, then the meters' args. Harmless twice.
_SETTLE = """
local id, lease, used = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for i, name in ipairs(KEYS) do
    local m = open(name, 4 * i)
    if release(m, id) then add(m, used, id) end
    save(m, lease)
end
"""

# KEYS: one meter. ARGV: lease, window, then the requests that live.
_RENEW = """
local lease, life = tonumber(ARGV[1]), math.max(tonumber(ARGV[1]), tonumber(ARGV[2])) + 1000
for i = 3, #ARGV do redis.call('ZADD', KEYS[1] .. ':held', 'XX', now + lease, ARGV[i]) end
for _, suffix in ipairs({'', ':held', ':log'}) do redis.call('PEXPIRE', KEYS[1] .. suffix, life) end
"""

RESERVE = _CLOCK + _METERS + _RESERVE
SETTLE = _CLOCK + _METERS + _SETTLE
RENEW = _CLOCK + _RENEW
